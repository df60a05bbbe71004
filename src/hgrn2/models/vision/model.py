"""The image model: stem, layers, pooling and classifier, with timm's interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.errors import UserError
from hgrn2.models.backbone import hand_out_bounds, run_layers
from hgrn2.models.block_stack import BlockStack
from hgrn2.models.vision.block import VisionBlock
from hgrn2.models.vision.config import VisionConfig
from hgrn2.models.vision.stem import (
    ConvStem,
    PatchStem,
    check_images,
    resize_positions,
    sincos_positions,
    to_tokens,
)  # fmt: skip
from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.mlp import GatedMLP
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues, draw, parameter_roles


class VisionModel(BlockStack):
    """Image model: computes the logits of classes, or features.

    Args:
        config: configuration of the model.
        backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.

    Attributes:
        num_features: D, the width of the features, as in timm.
        feature_info: width and reduction of each layer's features, as in timm.

    Example:
        >>> model = VisionModel(VisionConfig(img_size=32, patch_size=8, embed_dim=128, depth=2, num_classes=10))
        >>> model(torch.randn(2, 3, 64, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: VisionConfig, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.num_features = self.embed_dim = self.head_hidden_size = config.embed_dim
        self.num_classes, self.in_chans, self.global_pool = config.num_classes, config.in_chans, config.global_pool
        stem = PatchStem if config.stem == "patch" else ConvStem
        self.patch_embed = stem(config.in_chans, config.embed_dim, config.patch_size)
        rows, columns = config.grid
        learned = config.position == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.embed_dim)) if learned else None
        bounds = torch.empty(config.depth, config.embed_dim) if config.bounded_layers else None
        self.lower_bounds = None if bounds is None else nn.Parameter(bounds)
        self.layers = nn.ModuleList(_build_block(config, i, backend) for i in range(config.depth))
        self.norm = Norm(config.norm, config.embed_dim, config.norm_eps, True)
        self.pool = nn.Linear(config.embed_dim, 1) if config.global_pool == "seq" else None
        self.head = nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": config.embed_dim, "reduction": config.patch_size, "module": f"layers.{i}"}
            for i in range(config.depth)
        ]
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: [B, C, H, W], normalised; patch_size must divide H and W.

        Returns:
            Logits [B, num_classes]; pooled features [B, D] if num_classes is 0.

        Raises:
            UserError: the shape does not fit the model.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens [B, T, D] after the last norm, row by row.

        Args:
            x: [B, C, H, W].
        """
        return self.norm(self._run(x, self.layers))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and classify.

        Args:
            x: [B, T, D] from `forward_features`.
            pre_logits: return the pooled features instead of logits.
        """
        if self.global_pool:
            x = torch.einsum("bt,btd->bd", self.pool_weights(x).to(x.dtype), x)
        x = functional.dropout(x, self.config.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def pool_weights(self, x: Tensor) -> Tensor:
        """Return the share of each token in the pooled vector, [B, T] in float32 or wider; each row sums to 1.

        Args:
            x: [B, T, D] from `forward_features`.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.pool is not None:
            return self.pool(x).squeeze(2).to(wide).softmax(1)
        return torch.full(x.shape[:2], 1 / x.shape[1], dtype=wide, device=x.device)

    def get_classifier(self) -> nn.Module:
        """Return the classifier, as in timm."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: classes; 0 for none.
            global_pool: kind of pooling; None keeps it.
        """
        changes: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            changes["global_pool"] = global_pool
        self.config = self.config.replace(**changes)
        like = next(p for p in self.parameters() if p.is_floating_point())
        if global_pool is not None and global_pool != self.global_pool:
            self.global_pool = self.config.global_pool
            self.pool = nn.Linear(self.embed_dim, 1).to(like.device, like.dtype) if global_pool == "seq" else None
            if self.pool is not None:
                draw(self.pool, self.config.initializer_range)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes).to(like.device, like.dtype) if num_classes else nn.Identity()
        if num_classes:
            draw(self.head, self.config.initializer_range)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the features after chosen layers, as timm's feature extraction expects.

        Args:
            x: [B, C, H, W].
            indices: layers, negative ones from the end; a number n means the last n, None all.
            return_prefix_tokens: ignored, as there are no prefix tokens.
            norm: apply the last norm to each.
            stop_early: skip the layers after the last chosen one; only with `intermediates_only`.
            output_fmt: "NCHW" for [B, D, rows, columns], "NLC" for [B, T, D].
            intermediates_only: return the list alone, without the tokens after the last norm.
        """
        del return_prefix_tokens
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt is {output_fmt!r}; wanted 'NCHW' or 'NLC'")
        chosen = self._chosen(indices)
        layers = self.layers[: max(chosen) + 1] if stop_early and intermediates_only else self.layers
        inputs: list[Tensor] = []
        last = self._run(x, layers, inputs.append)
        outputs = [*inputs[1:], last]
        found = [self.norm(outputs[i]) if norm else outputs[i] for i in chosen]
        if output_fmt == "NCHW":
            grid = self._grid(x)
            found = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in found]
        return found if intermediates_only else (self.norm(last), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last chosen one; return the chosen ones. Arguments as in timm."""
        chosen = self._chosen(indices)
        self.layers = self.layers[: max(chosen) + 1]
        if prune_norm:
            self.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        if prune_head:
            self.pool, self.head = None, nn.Identity()
        return chosen

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch `activation_checkpointing`, as in timm."""
        self.activation_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices that have no weight decay, as in timm."""
        names = {"pos_embed": self.pos_embed, "lower_bounds": self.lower_bounds}
        return {name for name, parameter in names.items() if parameter is not None}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names by depth, for timm's layer-wise learning rates."""
        del coarse
        return {
            "stem": r"^patch_embed|^pos_embed|^lower_bounds",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))],
        }

    def parameter_roles(self) -> dict[str, str]:
        """Return the role of each parameter: convolutions count as embeddings, the classifier as a head."""
        roles = parameter_roles(self)
        for name, parameter in self.named_parameters():
            if name.startswith("patch_embed") and parameter.dim() == 4:
                roles[name] = "embedding"
        own = {"head.weight": "head", "lower_bounds": "lower_bounds"}
        return roles | {name: role for name, role in own.items() if name in roles}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its initial value: convolutions as torch does, the rest as `HGRN2LM.initialize`.

        Args:
            generator: source of the random numbers, except those of convolutions; None for torch's global one.
        """
        std = self.config.initializer_range
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, 0.0, std, generator=generator)
        if self.lower_bounds is not None:
            nn.init.zeros_(self.lower_bounds)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, VisionBlock)
            layer.reset_parameters(InitialValues(std, i, len(self.layers), generator))
        draw(self.norm, std, generator)
        for module in (self.pool, self.head):
            if isinstance(module, nn.Linear):
                draw(module, std, generator)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens [B, T, D] before the first layer, and the rows and columns of their grid.

        Args:
            x: [B, C, H, W].
        """
        check_images(x, self.in_chans, self.config.patch_size)
        grid = self._grid(x)
        tokens = to_tokens(self.patch_embed(x))
        if self.pos_embed is not None:
            tokens = tokens + resize_positions(self.pos_embed, self.config.grid, grid).to(tokens.dtype)
        elif self.config.position == "sincos":
            tokens = tokens + sincos_positions(*grid, self.embed_dim, x.device).to(tokens.dtype)
        return tokens, grid

    def run_from(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the tokens [B, T, D] after the last norm, from those of `embed`.

        Args:
            tokens: [B, T, D].
            grid: rows and columns of tokens.
        """
        return self.norm(self._run_layers(tokens, grid, self.layers))

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size

    def _run(self, x: Tensor, layers: nn.ModuleList, on_hidden: Callable[[Tensor], None] | None = None) -> Tensor:
        tokens, grid = self.embed(x)
        return self._run_layers(tokens, grid, layers, on_hidden)

    def _run_layers(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        layers: nn.ModuleList,
        on_hidden: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        tokens, bounds = hand_out_bounds(
            tokens, self.lower_bounds, self.config.lower_bound, self.config.bounded_layers, self.config.depth,
            detach_first=not self.is_compiled,
        )  # fmt: skip
        states: list[Any] = [None] * len(layers)
        context = Context(grid=grid, keep_state=False)
        return run_layers(layers, tokens, states, context, bounds, call=self.call_layer, on_hidden=on_hidden)

    @property
    def drop_rate_of_blocks(self) -> float:
        """Probability of dropout inside the blocks."""
        return self.config.drop_path_rate

    def _chosen(self, indices: int | Sequence[int] | None) -> list[int]:
        depth = len(self.layers)
        if indices is None:
            return list(range(depth))
        found = list(range(depth - indices, depth)) if isinstance(indices, int) else list(indices)
        if not found or any(not -depth <= i < depth for i in found):
            raise UserError(f"indices is {indices!r}; the model has layers 0 to {depth - 1}")
        return [i % depth for i in found]


def _build_block(config: VisionConfig, layer: int, backend: str) -> VisionBlock:
    name = config.layer_mixers[layer]
    direction = config.directions[layer]
    mixer = find_mixer(name).build(config.embed_dim, config.mixers[name], backend, direction=direction)
    mlp = GatedMLP(config.embed_dim, config.intermediate_size, config.glu_activation, config.use_bias)
    norms = [Norm(config.norm, config.embed_dim, config.norm_eps, True) for _ in range(2)]
    share = layer / max(1, config.depth - 1)
    drop_path = config.drop_path_rate * share if config.drop_path_rate else None
    return VisionBlock(mixer, mlp, norms[0], norms[1], drop_path)
