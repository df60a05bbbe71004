"""The scan by way of the CUDA kernels: which are launched, and with what."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.ops.cuda import kernels, plan
from hgrn2.ops.cuda.arguments import (
    BackwardArguments,
    BoundsArguments,
    CarryArguments,
    PackedArguments,
    WalkArguments,
)
from hgrn2.ops.cuda.plan import WIDTH, Group, Plan, Stretch
from hgrn2.ops.cuda.recipe import NOWHERE, Place, Recipe
from hgrn2.ops.gates import Floor

# between the tokens of an input: backward.cu counts bytes across four of them in 32 bits
MOST_ROW_BYTES = 2**29
# elements of a state that a thread carries
_CARRIED = 4
_STATE = WIDTH * WIDTH
_FLOAT32, _INT32, _SPAN = 4, 4, 16  # bytes
# forms whose recipes are kept, of each pass: the latest
_RECIPES = 64


class Scan(NamedTuple):
    """A call of `hgrn2.ops.hgrn2_scan` that `resolve_backend` gives to these kernels.

    Attributes:
        q: [B, T, H, K].
        f: [B, T, H, K].
        v: [B, T, H, V].
        bound: [H, K] float32 or None.
        initial_state: [N, H, K, V] float32 or None.
        cu_seqlens: [N + 1] or None.
        reverse: time runs from the last row to the first.
        scale: factor of the outputs.
        q_activation: of q.
        min_log_decay: floor under the log decay, or None.
    """

    q: Tensor
    f: Tensor
    v: Tensor
    bound: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    scale: float
    q_activation: str
    min_log_decay: float | None

    def aligned(self) -> Scan:
        """The same, to be read 16 bytes at a time; what the kernels know no strides of is contiguous."""
        q, f, v = _aligned(self.q), _aligned(self.f), _aligned(self.v)
        bound = None if self.bound is None else _aligned(self.bound.contiguous())
        state, cu_seqlens = (None if x is None else x.contiguous() for x in (self.initial_state, self.cu_seqlens))
        return self._replace(q=q, f=f, v=v, bound=bound, initial_state=state, cu_seqlens=cu_seqlens)

    def form(self, coarse: int) -> Form:
        """What this call, aligned, has in common with others; chunks between the states the forward pass keeps."""
        q, cu_seqlens = self.q, self.cu_seqlens
        packed = None if cu_seqlens is None else (cu_seqlens.shape[0] - 1, cu_seqlens.dtype == torch.int64)
        return Form(
            q.shape, (q.stride(), self.f.stride(), self.v.stride()), q.dtype, q.device.index, self.bound is not None,
            self.initial_state is not None, packed, self.reverse, self.scale, self.q_activation, self.min_log_decay,
            coarse,
        )  # fmt: skip

    def new_states(self, known: Tensor | None) -> Tensor:
        """Room for the states of all sequences; one that is packed and empty has the known one, or zeros."""
        num_states = self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        shape = (num_states, self.q.shape[2], WIDTH, WIDTH)
        make = torch.empty if self.cu_seqlens is None and self.q.numel() else torch.zeros
        states = make(shape, dtype=torch.float32, device=self.q.device)
        return states if make is torch.empty or known is None else states.copy_(known)


class Form(NamedTuple):
    """All of a call but where its tensors lie: what decides which kernels are launched, and with which numbers.

    Attributes:
        shape: of q.
        strides: of q, f and v.
        dtype: of q, f and v.
        device: its index.
        has_bound: whether there is a lower bound.
        has_initial: whether there is an initial state.
        packed: of packed sequences how many there are, and whether their boundaries have 8 bytes; else None.
        reverse: as in `Scan`.
        scale: as in `Scan`.
        q_activation: as in `Scan`.
        min_log_decay: as in `Scan`.
        coarse: chunks between the states that the forward pass keeps; 0 where it keeps none.
    """

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: int
    has_bound: bool
    has_initial: bool
    packed: tuple[int, bool] | None
    reverse: bool
    scale: float
    q_activation: str
    min_log_decay: float | None
    coarse: int

    def settings(self) -> kernels.Settings:
        """What kernels are compiled for."""
        floor = Floor.of(self.min_log_decay)
        return kernels.Settings(self.dtype, self.q_activation, self.packed is not None, floor)


class _Before(NamedTuple):
    """States before segments, [B, segments, heads, K, V], and which of them are those of a launch's first."""

    states: Place
    segments: int
    heads: int
    segment: int = 0
    head: int = 0

    def fields(self) -> dict[str, int]:
        """As the kernels are told."""
        names = ("segments", "heads", "segment", "head")
        return {f"before_{name}": getattr(self, name) for name in names}


def coarse_shape(batch: int, length: int, heads: int, coarse: int, num_packed: int = 0) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps with a distance of `coarse` chunks."""
    return (batch, plan.coarse_pieces(length, coarse, num_packed), heads, WIDTH, WIDTH)


def forward(scan: Scan, coarse: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scan.

    Args:
        scan: the call.
        coarse: chunks between the states `backward` needs; 0 to keep none.

    Returns:
        y [B, T, H, V], the final state [N, H, K, V], float32, and states on the way [B, pieces, H, K, V], float32.
    """
    scan = scan.aligned()
    form = scan.form(coarse)
    y, final = _new_like(scan.v), scan.new_states(scan.initial_state)
    (batch, length, heads, _), num_packed = form.shape, form.packed[0] if form.packed else 0
    shape = coarse_shape(batch, length, heads, coarse, num_packed)
    states = torch.empty(shape, dtype=torch.float32, device=scan.q.device)
    if y.numel():
        _forward_recipe(form).run(
            scan.q.device, q=scan.q, f=scan.f, v=scan.v, bound=scan.bound, initial=scan.initial_state,
            cu_seqlens=scan.cu_seqlens, y=y, final=final, states=states,
        )  # fmt: skip
    return y, final, states


def backward(
    scan: Scan, dy: Tensor, d_final: Tensor | None, states: Tensor, coarse: int, bound_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradient of `forward`, for bfloat16.

    Args:
        scan: the call.
        dy: [B, T, H, V].
        d_final: [N, H, K, V] float32, or None for zeros.
        states: what the forward pass kept.
        coarse: chunks between them.
        bound_wanted: whether the lower bound's gradient is.

    Returns:
        Gradients of q, f, v, the lower bound and the initial state (None where there is none, or it is not wanted).
    """
    scan, dy = scan.aligned(), _aligned(dy)
    d_final = None if d_final is None else d_final.contiguous()
    dq, df, dv = (_new_like(x) for x in (scan.q, scan.f, scan.v))
    d_initial = None if scan.initial_state is None else scan.new_states(d_final)
    d_bound = torch.empty_like(scan.bound) if scan.bound is not None and bound_wanted else None
    if dq.numel():
        _backward_recipe(scan.form(coarse), dy.stride(), d_final is not None, d_bound is not None).run(
            scan.q.device, q=scan.q, f=scan.f, v=scan.v, bound=scan.bound, initial=scan.initial_state,
            cu_seqlens=scan.cu_seqlens, dy=dy, states=states, d_final=d_final, dq=dq, df=df, dv=dv, d_bound=d_bound,
            d_initial=d_initial,
        )  # fmt: skip
    elif d_bound is not None:
        d_bound.zero_()
    return dq, df, dv, d_bound, d_initial


class _Call:
    """What the launches of a call share.

    Args:
        form: of the call.
        outputs: at most three, a row for each of the inputs.

    Attributes:
        recipe: to which they are added.
        plan: how the work is cut.
        spans: [chunks, 4] int32, of each chunk of packed sequences: row of its first token in time, tokens to its
            sequence's end, its sequence, and whether it is the sequence's first (1) or last (2).
        num_spans: [1] int32, how many there are.
    """

    def __init__(self, form: Form, *outputs: str):
        self.form, (self.batch, self.length, self.heads, _) = form, form.shape
        num_packed, wide = form.packed or (0, False)
        self.plan = Plan(self.batch, self.length, self.heads, form.coarse, num_packed)
        self.recipe = Recipe(lambda name: kernels.compiled(name, form.settings(), form.device))
        self.bound = Place("bound") if form.has_bound else NOWHERE
        self.initial = Place("initial") if form.has_initial else NOWHERE
        self.spans = self.num_spans = NOWHERE
        if form.packed:
            # found on the device, which clears outputs of no sequence as well
            self.spans, self.num_spans = self.recipe.room(self.plan.chunks * _SPAN), self.recipe.room(_INT32)
            places = [Place("cu_seqlens"), self.spans, self.num_spans, *(Place(name) for name in outputs)]
            places += [NOWHERE] * (PackedArguments.OUTPUTS - len(outputs))
            arguments = PackedArguments(
                length=self.length, sequences=num_packed, most=self.plan.chunks, heads=self.heads, wide=wide,
                reverse=form.reverse,
            )  # fmt: skip
            self.recipe.launch("cut_sequences", (1, 1, 1), arguments, *places)

    def strides(self, **tensors: Sequence[int]) -> dict[str, int]:
        """As the kernels are told."""
        axes = ("batch", "row", "head")
        return {f"{name}_{axis}": x[i] for name, x in tensors.items() for i, axis in enumerate(axes)}

    def walk(
        self, name: str, group: Group, stretch: Stretch, *, v: tuple[str, Sequence[int]], initial: Place,
        before: _Before | None = None, **places: Place,
    ) -> None:  # fmt: skip
        """Adds a launch of a kernel of walk.cu.

        Args:
            name: of the kernel.
            group: heads to work on.
            stretch: chunks to work on.
            v: the values (v, or dy backwards) and their strides.
            initial: [N, H, K, V], the states that sequences begin with or, backwards, the gradients of their last.
            before: states before the segments; None for zeros.
            places: of what else it reads or writes, by the name in `WalkArguments`.
        """
        form = self.form
        places |= {"q": Place("q"), "f": Place("f"), "v": Place(v[0]), "bound": self.bound, "initial": initial}
        places |= {"spans": self.spans, "num_spans": self.num_spans}
        if before is not None:
            places["before"] = before.states
        arguments = WalkArguments(
            length=self.length, heads=self.heads, first_head=group.first, first_chunk=stretch.first,
            end_chunk=stretch.end, segments=stretch.segments, segment_chunks=stretch.segment,
            coarse_chunks=form.coarse, pieces=self.plan.pieces, kept_chunks=stretch.chunks, reverse=form.reverse,
            scale=form.scale, **self.strides(q=form.strides[0], f=form.strides[1], v=v[1]),
            **({} if before is None else before.fields()),
        )  # fmt: skip
        pointers = _in_order(WalkArguments.POINTERS, places)
        self.recipe.launch(name, (stretch.segments, group.count, self.batch), arguments, *pointers)

    def states_before_segments(
        self, name: str, group: Group, stretch: Stretch, v: tuple[str, Sequence[int]], initial: Place, back: bool
    ) -> _Before:
        """States before the segments (back: after them), from what each adds and how it decays.

        Args:
            name: of the kernel that finds the latter.
            group: heads to work on.
            stretch: chunks to work on, all of a sequence.
            v: see walk.
            initial: see walk.
            back: from the last segment to the first.
        """
        rows, segments = self.batch * group.count * stretch.segments, stretch.segments
        updates = self.recipe.room(rows * _STATE * _FLOAT32)
        decays = self.recipe.room(rows * 2 * WIDTH * _FLOAT32)
        self.walk(name, group, stretch, v=v, initial=initial, update=updates, decay=decays)
        blocks = _STATE // (_CARRIED * kernels.CARRY_THREADS)
        arguments = CarryArguments(segments=segments, back=back)
        self.recipe.launch("carry_states", (blocks, group.count, self.batch), arguments, updates, decays)
        return _Before(updates, segments, group.count)

    def gradients(
        self, group: Group, part: Stretch, dy_strides: Sequence[int], before: _Before | None, **places: Place
    ) -> None:
        """Adds launches of a fast kernel for all gradients, and of an exact one for what that leaves over.

        Args:
            group: heads to work on.
            part: chunks to work on.
            dy_strides: of the gradient of the outputs.
            before: gradients of the states after the part's segments; None for zeros.
            places: of what else they read or write, by the name in `BackwardArguments`.
        """
        form = self.form
        places |= {name: Place(name) for name in ("q", "f", "v", "dy", "dq", "df", "dv")}
        places |= {"bound": self.bound, "spans": self.spans, "num_spans": self.num_spans}
        if before is not None:
            places["before"] = before.states
        q, f, v = form.strides
        arguments = BackwardArguments(
            length=self.length, batches=self.batch, heads=self.heads, chunks=self.plan.chunks, first_head=group.first,
            group=group.count, first_chunk=part.first, end_chunk=part.end, segment_chunks=part.segment,
            part_chunks=part.chunks, reverse=form.reverse, scale=form.scale,
            **self.strides(q=q, f=f, v=v, dy=dy_strides), **({} if before is None else before.fields()),
        )  # fmt: skip
        pointers = _in_order(BackwardArguments.POINTERS, places)
        self.recipe.launch("backward_walk", (part.segments, group.count, self.batch), arguments, *pointers)
        self.recipe.launch("backward_left_over", (2 * plan.MULTIPROCESSORS, 1, 1), arguments, *pointers)


@functools.lru_cache(_RECIPES)
def _forward_recipe(form: Form) -> Recipe:
    if form.coarse:
        # the backward pass follows
        for file in ("backward.cu", "left_over.cu"):
            kernels.begin(file, form.settings(), form.device)
    call = _Call(form, "y")
    group, stretch = Group(0, call.heads), call.plan.whole
    v, before = ("v", form.strides[2]), None
    if stretch.segments > 1:
        before = call.states_before_segments("forward_summaries", group, stretch, v, call.initial, back=False)
    outputs = {"y": Place("y"), "final": Place("final")}
    if call.plan.pieces:
        outputs["coarse"] = Place("states")
    call.walk("forward_outputs", group, stretch, v=v, initial=call.initial, before=before, **outputs)
    return call.recipe


@functools.lru_cache(_RECIPES)
def _backward_recipe(form: Form, dy_strides: tuple[int, ...], has_d_final: bool, bound_wanted: bool) -> Recipe:
    call, coarse = _Call(form, "dq", "df", "dv"), form.coarse
    recipe, parts, heads = call.recipe, call.plan.parts, call.plan.passes.heads
    assert coarse == parts[0].segment, f"states every {coarse} chunks; wanted {parts[0].segment}"
    # of packed sequences there may be fewer chunks: nobody writes the rest, which is summed, and carried, like all
    packed = form.packed is not None
    # one room for all groups and parts, that of the largest
    chunks = call.batch * parts[-1].chunks * heads
    kept, d_kept = (recipe.room(chunks * _STATE * form.dtype.itemsize) for _ in range(2))
    # of every chunk
    rows = call.batch * call.plan.chunks
    d_bounds = recipe.room(rows * call.heads * WIDTH * _FLOAT32, zeros=packed) if bound_wanted else NOWHERE
    # the gradient of the state, from part to part; a sequence's own end takes its place where one ends
    carries = len(parts) > 1 and parts[-1].segments == 1
    carried = recipe.room(call.batch * heads * _STATE * _FLOAT32, zeros=packed) if carries else NOWHERE
    v, dy = ("v", form.strides[2]), ("dy", dy_strides)
    d_final = Place("d_final") if has_d_final else NOWHERE
    d_initial = Place("d_initial") if form.has_initial else NOWHERE
    for group in call.plan.groups:
        after = _Before(carried, 1, group.count) if carries else None
        if parts[-1].segments > 1:
            # there is one group then: several have programs enough without segments
            every = Stretch(0, call.plan.chunks, coarse)
            after = call.states_before_segments("backward_summaries", group, every, dy, d_final, back=True)
        for part in parts:
            # of the states that were kept, each begins a segment; the one that a sequence begins with is not among them
            first, before = part.first // coarse, None
            if call.plan.pieces:
                before = _Before(Place("states"), call.plan.pieces, call.heads, first - 1, group.first)
            call.walk("forward_states", group, part, v=v, initial=call.initial, before=before, kept=kept)
            # gradients of states after the part: of each of its segments, or what the part after it left
            of_part = after if after is None or carries else after._replace(segment=first)
            call.gradients(
                group, part, dy_strides, of_part, states=kept, d_states=d_kept, d_bound=d_bounds, d_final=d_final,
                d_initial=d_initial, after=carried, left_over=recipe.room(chunks * 2 * _INT32, zeros=True),
            )  # fmt: skip
    if bound_wanted:
        arguments = BoundsArguments(rows=rows, heads=call.heads)
        recipe.launch("sum_bounds", (call.heads, 1, 1), arguments, d_bounds, Place("d_bound"))
    return recipe


def _in_order(pointers: Sequence[str], places: Mapping[str, Place]) -> list[Place]:
    """Places by the names of a structure's pointers."""
    assert places.keys() <= set(pointers), f"no pointers {places.keys() - set(pointers)}"
    return [places.get(name, NOWHERE) for name in pointers]


def _aligned(x: Tensor) -> Tensor:
    """X itself if its rows can be read 16 bytes at a time, which those of a fused projection can; else a copy."""
    fits = x.data_ptr() % 16 == 0 and _can_be_read(x.stride(), x.element_size())
    # contiguous() would give back what is contiguous at a bad address
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache
def _can_be_read(strides: tuple[int, ...], element_size: int) -> bool:
    steps = [s * element_size for s in strides[:-1]]
    # [B, T, H, K]
    near = len(steps) != 3 or steps[1] < MOST_ROW_BYTES
    return strides[-1] == 1 and near and not any(step % 16 for step in steps)


def _new_like(x: Tensor) -> Tensor:
    """Room for a contiguous tensor."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
