"""MAE (He et al., CVPR 2022) out of torch's own layers, by its paper: what ours is compared with.

Mask tokens are put where patches are missing, everything is put back into raster order, and the decoder
sees it with positions; the loss is a mean over masked patches. Nothing of it is shared with ours but the
weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stopfast.objectives.reconstruction import Reconstruction

_LAYER = {
    "self_attn.in_proj_": "attn.qkv.",
    "self_attn.out_proj.": "attn.proj.",
    "linear1.": "mlp.fc1.",
    "linear2.": "mlp.fc2.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
}


class PlainMae(nn.Module):
    """With the sizes and weights of an objective, in fp64."""

    def __init__(self, objective: Reconstruction, heads: int = 2) -> None:
        super().__init__()
        encoder, decoder = objective.encoder, objective.decoder
        self.patch, self.grid = encoder.patch_embed.patch_size, encoder.patch_embed.grid
        self.visible = objective.visible
        wide, narrow = encoder.embed_dim, decoder.predictor_embed.out_features
        self.embed = nn.Conv2d(3, wide, self.patch, self.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, wide))
        self.encoder = _layers(wide, heads, len(encoder.blocks))
        self.norm = nn.LayerNorm(wide, eps=1e-6)
        self.to_decoder = nn.Linear(wide, narrow)
        self.mask = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder = _layers(narrow, heads, len(decoder.predictor_blocks))
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        self.head = nn.Linear(narrow, 3 * self.patch**2)
        self.double()
        self.names = self._names()
        found = {n: p.detach() for m in objective.modules().values() for n, p in _named(m)}
        self.load_state_dict({theirs: found[mine] for theirs, mine in self.names.items()})

    def forward(self, images: Tensor, order: Tensor) -> dict[str, Tensor]:
        """The encoder's tokens, every patch's prediction in raster order, and the loss."""
        images = images.double()
        patches = self.embed(images).flatten(2).transpose(1, 2)
        patches = patches + _positions(patches.shape[2], self.grid)
        shown = torch.stack([p[o] for p, o in zip(patches, order[:, : self.visible], strict=True)])
        x = torch.cat([self.cls.expand(len(images), 1, -1), shown], 1)
        features = self.norm(_through(self.encoder, x))
        x = self.to_decoder(features)
        first, told = x[:, :1], x[:, 1:]
        hidden = self.mask.expand(len(x), order.shape[1] - self.visible, -1)
        shuffled = torch.cat([told, hidden], 1)
        whole = torch.zeros_like(shuffled)
        for image, places in enumerate(order):
            whole[image, places] = shuffled[image]
        whole = whole + _positions(whole.shape[2], self.grid)
        x = self.decoder_norm(_through(self.decoder, torch.cat([first, whole], 1)))
        prediction = self.head(x[:, 1:])
        masked = torch.ones(order.shape, dtype=torch.bool)
        masked.scatter_(1, order[:, : self.visible], False)
        error = (prediction - _targets(images, self.patch)).square().mean(2)
        loss = (error * masked).sum() / masked.sum()
        return {"features": features, "prediction": prediction, "loss": loss}

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter, by the objective's names."""
        return {mine: self.get_parameter(theirs).grad for theirs, mine in self.names.items()}  # type: ignore[misc]

    def _names(self) -> dict[str, str]:
        names = {"embed.": "patch_embed.proj.", "cls": "cls_token", "norm.": "norm."}
        names |= {"to_decoder.": "predictor_embed.", "mask": "mask_token"}
        names |= {"decoder_norm.": "predictor_norm.", "head.": "predictor_proj."}
        names |= {f"encoder.{n}": f"blocks.{n}" for n in map(str, range(len(self.encoder)))}
        names |= {
            f"decoder.{n}": f"predictor_blocks.{n}" for n in map(str, range(len(self.decoder)))
        }
        found = {}
        for own, _ in self.named_parameters():
            prefix = max((p for p in names if own.startswith(p)), key=len)
            name = own.replace(prefix, names[prefix], 1)
            for theirs, mine in _LAYER.items():
                name = name.replace(f".{theirs}", f".{mine}")
            found[own] = name
        return found


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if "pos_embed" not in n]


def _layers(width: int, heads: int, depth: int) -> nn.ModuleList:
    settings: dict[str, Any] = dict(
        dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, 4 * width, **settings) for _ in range(depth)
    )


def _through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Sines and cosines of the column, then of the row, at width / 4 frequencies."""
    quarter = width // 4
    omega = torch.tensor([10000.0 ** (-k / quarter) for k in range(quarter)], dtype=torch.float64)
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [at * omega for at in (column, row)]
            rows.append(torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)]))
    return torch.stack(rows).float().double()  # as published, the table is in fp32


def _targets(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, channels last, less their mean over their deviation."""
    batch, _, height, width = images.shape
    rows = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            tile = images[:, :, top : top + patch, left : left + patch]
            flat = tile.permute(0, 2, 3, 1).reshape(batch, -1)
            variance = flat.var(1, keepdim=True)
            rows.append((flat - flat.mean(1, keepdim=True)) / (variance + 1e-6).sqrt())
    return torch.stack(rows, 1)
