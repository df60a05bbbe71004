"""The launches of a scan, found once for all calls that differ in nothing but their tensors' addresses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from hgrn2.ops.backends.cuda import kernels, plan
from hgrn2.ops.backends.cuda.arguments import (
    BackwardArguments,
    BoundsArguments,
    CarryArguments,
    PackedArguments,
    WalkArguments,
)
from hgrn2.ops.backends.cuda.plan import WIDTH, Group, Plan, Stretch
from hgrn2.ops.backends.cuda.recipe import NOWHERE, Place, Recipe
from hgrn2.ops.call import ScanSettings
from hgrn2.ops.gates import Floor

# elements of a state that a thread carries
_CARRIED = 4
_STATE = WIDTH * WIDTH
_FLOAT32, _INT32, _SPAN = 4, 4, 16  # bytes
# keys whose recipes are kept, of each pass: the latest
_RECIPES = 64


class LaunchKey(NamedTuple):
    """All of a call but where its tensors lie: what decides which kernels are launched, and with which numbers.

    Attributes:
        shape: of q.
        strides: of q, f and v.
        dtype: of q, f and v.
        device: its index.
        has_bound: whether there is a lower bound.
        has_initial: whether there is an initial state.
        packed: of packed sequences how many there are, and whether their boundaries have 8 bytes; else None.
        settings: of the call.
        coarse: chunks between the states that the forward pass keeps; 0 where it keeps none.
    """

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: int
    has_bound: bool
    has_initial: bool
    packed: tuple[int, bool] | None
    settings: ScanSettings
    coarse: int

    def kernel_settings(self) -> kernels.Settings:
        """Return what kernels are compiled for."""
        floor = Floor.of(self.settings.min_log_decay)
        return kernels.Settings(self.dtype, self.settings.q_activation, self.packed is not None, floor)


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


class _Call:
    """What the launches of a call share.

    Args:
        key: of the call.
        outputs: at most three, a row for each of the inputs.

    Attributes:
        recipe: to which they are added.
        plan: how the work is cut.
        spans: [chunks, 4] int32, of each chunk of packed sequences: row of its first token in time, tokens to its
            sequence's end, its sequence, and whether it is the sequence's first (1) or last (2).
        num_spans: [1] int32, how many there are.
    """

    def __init__(self, key: LaunchKey, *outputs: str):
        self.key, (self.batch, self.length, self.heads, _) = key, key.shape
        num_packed, wide = key.packed or (0, False)
        self.plan = Plan(self.batch, self.length, self.heads, key.coarse, num_packed)
        self.recipe = Recipe(lambda name: kernels.compiled(name, key.kernel_settings(), key.device))
        self.bound = Place("bound") if key.has_bound else NOWHERE
        self.initial = Place("initial") if key.has_initial else NOWHERE
        self.spans = self.num_spans = NOWHERE
        if key.packed:
            # found on the device, which clears outputs of no sequence as well
            self.spans, self.num_spans = self.recipe.room(self.plan.chunks * _SPAN), self.recipe.room(_INT32)
            places = [Place("cu_seqlens"), self.spans, self.num_spans, *(Place(name) for name in outputs)]
            places += [NOWHERE] * (PackedArguments.OUTPUTS - len(outputs))
            arguments = PackedArguments(
                length=self.length, sequences=num_packed, most=self.plan.chunks, heads=self.heads, wide=wide,
                reverse=key.settings.reverse,
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
        key = self.key
        places |= {"q": Place("q"), "f": Place("f"), "v": Place(v[0]), "bound": self.bound, "initial": initial}
        places |= {"spans": self.spans, "num_spans": self.num_spans}
        if before is not None:
            places["before"] = before.states
        arguments = WalkArguments(
            length=self.length, heads=self.heads, first_head=group.first, first_chunk=stretch.first,
            end_chunk=stretch.end, segments=stretch.segments, segment_chunks=stretch.segment,
            coarse_chunks=key.coarse, pieces=self.plan.pieces, kept_chunks=stretch.chunks, reverse=key.settings.reverse,
            scale=key.settings.scale, **self.strides(q=key.strides[0], f=key.strides[1], v=v[1]),
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
        key = self.key
        places |= {name: Place(name) for name in ("q", "f", "v", "dy", "dq", "df", "dv")}
        places |= {"bound": self.bound, "spans": self.spans, "num_spans": self.num_spans}
        if before is not None:
            places["before"] = before.states
        q, f, v = key.strides
        arguments = BackwardArguments(
            length=self.length, batches=self.batch, heads=self.heads, chunks=self.plan.chunks, first_head=group.first,
            group=group.count, first_chunk=part.first, end_chunk=part.end, segment_chunks=part.segment,
            part_chunks=part.chunks, reverse=key.settings.reverse, scale=key.settings.scale,
            **self.strides(q=q, f=f, v=v, dy=dy_strides), **({} if before is None else before.fields()),
        )  # fmt: skip
        pointers = _in_order(BackwardArguments.POINTERS, places)
        self.recipe.launch("backward_walk", (part.segments, group.count, self.batch), arguments, *pointers)
        self.recipe.launch("backward_left_over", (2 * plan.MULTIPROCESSORS, 1, 1), arguments, *pointers)


@functools.lru_cache(_RECIPES)
def forward_recipe(key: LaunchKey) -> Recipe:
    """Return the launches of a forward pass."""
    if key.coarse:
        # the backward pass follows
        for file in ("backward.cu", "left_over.cu"):
            kernels.begin(file, key.kernel_settings(), key.device)
    call = _Call(key, "y")
    group, stretch = Group(0, call.heads), call.plan.whole
    v, before = ("v", key.strides[2]), None
    if stretch.segments > 1:
        before = call.states_before_segments("forward_summaries", group, stretch, v, call.initial, back=False)
    outputs = {"y": Place("y"), "final": Place("final")}
    if call.plan.pieces:
        outputs["coarse"] = Place("states")
    call.walk("forward_outputs", group, stretch, v=v, initial=call.initial, before=before, **outputs)
    return call.recipe


@functools.lru_cache(_RECIPES)
def backward_recipe(key: LaunchKey, dy_strides: tuple[int, ...], has_d_final: bool, bound_wanted: bool) -> Recipe:
    """Return the launches of a backward pass.

    Args:
        key: of the call.
        dy_strides: strides of the gradient of the outputs.
        has_d_final: whether the final state has a gradient.
        bound_wanted: whether the gradient of the lower bound is wanted.
    """
    call, coarse = _Call(key, "dq", "df", "dv"), key.coarse
    recipe, parts, heads = call.recipe, call.plan.parts, call.plan.passes.heads
    assert coarse == parts[0].segment, f"states every {coarse} chunks; wanted {parts[0].segment}"
    # of packed sequences there may be fewer chunks: nobody writes the rest, which is summed, and carried, like all
    packed = key.packed is not None
    # one room for all groups and parts, that of the largest
    chunks = call.batch * parts[-1].chunks * heads
    kept, d_kept = (recipe.room(chunks * _STATE * key.dtype.itemsize) for _ in range(2))
    # of every chunk
    rows = call.batch * call.plan.chunks
    d_bounds = recipe.room(rows * call.heads * WIDTH * _FLOAT32, zeros=packed) if bound_wanted else NOWHERE
    # the gradient of the state, from part to part; a sequence's own end takes its place where one ends
    carries = len(parts) > 1 and parts[-1].segments == 1
    carried = recipe.room(call.batch * heads * _STATE * _FLOAT32, zeros=packed) if carries else NOWHERE
    v, dy = ("v", key.strides[2]), ("dy", dy_strides)
    d_final = Place("d_final") if has_d_final else NOWHERE
    d_initial = Place("d_initial") if key.has_initial else NOWHERE
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
