"""Mistakes that cases 41 to 49 of the specification name, for `python -m tests.mutants`."""

from tests.mutation import Mutant

PATCHES, ZOOMED = "stopfast/patches.py", "stopfast/degradations/zoomed.py"
SPOILT, RESIZING = "stopfast/degradations/spoilt.py", "stopfast/degradations/resizing.py"
DRAWING = "stopfast/degradations/drawing.py"

MUTANTS = (
    Mutant(
        41,
        "edges averaged instead of summed",
        ZOOMED,
        ".sum() / max(1, error.shape[0]",
        ".sum() / max(1, 4 * error.shape[0]",
    ),
    Mutant(
        41,
        "edges of the field that was not resized before it was normalised",
        ZOOMED,
        "normalised_patches(self.whole(images), self.target))",
        "normalised_patches(self.view(images), self.target))",
    ),
    Mutant(
        41,
        "left and top exchanged",
        RESIZING,
        "((2, left_top[1]), (3, left_top[0]))",
        "((2, left_top[0]), (3, left_top[1]))",
    ),
    Mutant(
        41,
        "row before column in a centre",
        SPOILT,
        'torch.meshgrid(x, y, indexing="xy")',
        'torch.meshgrid(x, y, indexing="xy")[::-1]',
    ),
    Mutant(42, "channels first", PATCHES, "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)"),
    Mutant(
        43,
        "channels normalised together",
        PATCHES,
        '(2, 3) if target.norm == "patch" else 2',
        "(2, 3)",
    ),
    Mutant(
        43, "biased variance", PATCHES, "axes, keepdim=True)", "axes, correction=0, keepdim=True)"
    ),
    Mutant(
        44,
        "a corner of the field instead of its middle",
        ZOOMED,
        "images[..., self.margin : self.margin + height,",
        "images[..., :height,",
    ),
    Mutant(
        44,
        "corners in all strips",
        ZOOMED,
        "weights[:margin] = weights[-margin:] = 1 /",
        "weights[:margin] += 1 / (margin * width)\n        weights[-margin:] += 1 /",
    ),
    Mutant(
        44,
        "every patch of the middle counts",
        ZOOMED,
        "ops.patch_mse(predicted, self.view(images), masked,",
        "ops.patch_mse(patchify(self.view(field), size), self.view(images), None,",
    ),
    Mutant(
        44,
        "weights exchanged",
        ZOOMED,
        "(1 - self.edge_weight) * center + self.edge_weight * edge",
        "self.edge_weight * center + (1 - self.edge_weight) * edge",
    ),
    Mutant(45, "pixels at a side come once", RESIZING, "-1 - place", "-place"),
    Mutant(
        45, "an image's own place", RESIZING, "2 * length - 1 - place", "2 * length - 2 - place"
    ),
    Mutant(
        45,
        "last place never drawn",
        ZOOMED,
        "of_step(seed, 2) * (2 * self.margin)",
        "of_step(seed, 2) * (2 * self.margin - 1)",
    ),
    Mutant(46, "in a straight line", SPOILT, "* distance * towards", "* towards"),
    Mutant(
        46,
        "by the cube of the distance, which leaves the image",
        SPOILT,
        "* distance * towards",
        "* distance.square() * towards",
    ),
    Mutant(46, "folded too far out", SPOILT, "* distance * towards", "* distance / 2 * towards"),
    Mutant(46, "away from the centre", SPOILT, "return place + draws", "return place - draws"),
    Mutant(46, "centres in a quarter of the image", SPOILT, "2 * drawn[:, :2] - 1", "drawn[:, :2]"),
    Mutant(46, "lattice of pixel corners", SPOILT, "align_corners=True", "align_corners=False"),
    Mutant(47, "weights up to 1", SPOILT, "(self._MOST * of_step(seed, 3))", "of_step(seed, 3)"),
    Mutant(
        47,
        "one weight",
        SPOILT,
        "(self._MOST * of_step(seed, 3))",
        "(self._MOST * of_step(seed, 1)).expand(3)",
    ),
    Mutant(
        48,
        "one kernel for all images",
        SPOILT,
        "of_images(seed, sample_ids, math.prod(shape))",
        "of_images(seed, 0 * sample_ids, math.prod(shape))",
    ),
    Mutant(48, "weights of mean 0", SPOILT, "self._KERNEL**-2 + self.std", "0 + self.std"),
    Mutant(
        48,
        "three channels share a mean of 1/49",
        SPOILT,
        "self._KERNEL**-2 + self.std",
        "self._KERNEL**-2 / 3 + self.std",
    ),
    Mutant(48, "std as a variance", SPOILT, "self.std * drawn", "self.std**0.5 * drawn"),
    Mutant(
        48,
        "uniform weights",
        SPOILT,
        "torch.special.ndtri(of_images(seed, sample_ids, math.prod(shape)) + 2.0**-33)",
        "12**0.5 * (of_images(seed, sample_ids, math.prod(shape)) - 0.5)",
    ),
    Mutant(
        48,
        "images mixed",
        SPOILT,
        ".view_as(images)",
        ".view(3, batch, *self.size).transpose(0, 1)",
    ),
    Mutant(
        49,
        "windows rounded inwards",
        RESIZING,
        "place * new < (i + 1) * old)",
        "place < (i + 1) * old // new)",
    ),
    Mutant(
        49, "sums instead of means", RESIZING, "covered / covered.sum(1, keepdim=True)", "covered"
    ),
    Mutant(
        49,
        "nearest pixel",
        RESIZING,
        "covered = (place >=",
        "covered = (place <= i * old // new) & (place >=",
    ),
)
