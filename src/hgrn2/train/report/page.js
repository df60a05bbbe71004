"use strict";
(() => {
  const points = JSON.parse(document.getElementById("points").textContent);
  const train = points.train, heldOut = points.validation;
  const whole = new Intl.NumberFormat("en");

  function duration(s) {
    const part = (n) => String(n).padStart(2, "0");
    s = Math.round(s);
    const h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
    return h ? h + ":" + part(m) + ":" + part(s % 60) : m + ":" + part(s % 60);
  }

  function figure(value, digits) {
    return value === null ? "not recorded" : value.toPrecision(digits);
  }

  function nearest(values, x) {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle; else high = middle;
    }
    return x - values[low] <= values[high] - x ? low : high;
  }

  function lines(i) {
    const found = [
      "step " + whole.format(train.step[i]) + ", " + whole.format(train.tokens[i]) + " " + points.counted + ", " + duration(train.elapsed_s[i]),
      "training " + figure(train.loss[i], 5) + ", smoothed " + figure(train.smoothed[i], 5),
    ];
    let before = -1;
    heldOut.step.forEach((step, at) => { if (step <= train.step[i]) before = at; });
    if (before >= 0) {
      const bits = heldOut.val_bits_per_byte[before];
      found.push("held-out " + figure(heldOut.val_loss[before], 5) + (bits === null ? "" : ", " + figure(bits, 4) + " bits per byte")
        + " (step " + whole.format(heldOut.step[before]) + ")");
    }
    found.push("learning rate " + figure(train.learning_rate[i], 3) + ", gradient " + figure(train.grad_norm[i], 3));
    if (train.tokens_per_s[i] !== null) found.push(whole.format(Math.round(train.tokens_per_s[i])) + " " + points.counted + " per second");
    return found;
  }

  function probe(plot) {
    const x = train[plot.dataset.x], low = Number(plot.dataset.low), high = Number(plot.dataset.high);
    const cursor = document.createElement("div"), readout = document.createElement("div");
    cursor.className = "cursor";
    readout.className = "readout";
    cursor.hidden = readout.hidden = true;
    plot.append(cursor, readout);
    let at = x.length - 1;

    function show(index) {
      at = Math.min(x.length - 1, Math.max(0, index));
      const percent = 100 * (x[at] - low) / (high - low);
      const text = lines(at);
      cursor.style.left = percent + "%";
      readout.textContent = text.join("\n");
      cursor.hidden = readout.hidden = false;
      const room = plot.clientWidth - readout.offsetWidth, wanted = plot.clientWidth * percent / 100 + 12;
      const left = wanted <= room ? wanted : wanted - 24 - readout.offsetWidth;
      readout.style.left = Math.max(Math.min(0, room), Math.min(left, room + 24)) + "px";
      plot.setAttribute("aria-valuenow", at + 1);
      plot.setAttribute("aria-valuetext", text.join("; "));
    }

    function hide() { cursor.hidden = readout.hidden = true; }

    plot.tabIndex = 0;
    plot.setAttribute("role", "slider");
    plot.setAttribute("aria-valuemin", 1);
    plot.setAttribute("aria-valuemax", x.length);
    plot.setAttribute("aria-valuenow", x.length);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show(nearest(x, low + (high - low) * (event.clientX - box.left) / box.width));
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at); });
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(x.length / 10));
      const moves = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - far, PageUp: at + far, Home: 0, End: x.length - 1 };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(moves[event.key]);
    });
  }

  if (train) document.querySelectorAll(".plot[data-x]").forEach(probe);

  document.querySelectorAll(".code").forEach((block) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy: " + block.parentElement.previousElementSibling.textContent);
    button.addEventListener("click", async () => {
      let done = false;
      try {
        await navigator.clipboard.writeText(block.textContent);
        done = true;
      } catch (refused) {
        // a page from a file may not be let at the clipboard: select, and the person copies
        getSelection().selectAllChildren(block);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    block.after(button);
  });

  // what is folded away would be missing on paper
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
})();
