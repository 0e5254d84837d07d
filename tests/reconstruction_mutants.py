"""Mistakes in MAE, Beyond Masking and their networks, for `python -m tests.mutants`."""

from tests.mutation import Mutant

OBJECTIVE, BLOCK = "stopfast/objectives/reconstruction.py", "stopfast/block.py"
PREDICTOR, ENCODER = "stopfast/predictor.py", "stopfast/encoder.py"
INITIAL, POSITIONS = "stopfast/initial.py", "stopfast/pos_embed.py"
OPTIM, SCHEDULES = "stopfast/optim.py", "stopfast/schedules.py"
PRESETS = "stopfast/presets/decoders.py"

MUTANTS = (
    Mutant(13, "tokens decayed in all", OPTIM, "() if self.decay_tokens else TOKENS", "()"),
    Mutant(13, "tokens decayed in none", OPTIM, "() if self.decay_tokens else TOKENS", "TOKENS"),
    Mutant(
        13,
        "a warm-up that does not arrive",
        SCHEDULES,
        "self.warmup_steps - self.warmup_arrives",
        "self.warmup_steps",
    ),
    Mutant(
        13, "the first update has passed a step", SCHEDULES, "step -= self.counted_before", "pass"
    ),
    Mutant(
        14,
        "cut at two deviations",
        INITIAL,
        "std=std, a=-std, b=std)\n    elif",
        "std=std, a=-2 * std, b=2 * std)\n    elif",
    ),
    Mutant(
        14,
        "the projection into the decoder drawn again",
        PREDICTOR,
        'keeps_default = init == "truncated"',
        "keeps_default = False",
    ),
    Mutant(
        14,
        "patches not drawn as one matrix",
        INITIAL,
        "sum(rows.shape)",
        "sum(layer.weight.shape[:2])",
    ),
    Mutant(
        14,
        "the patches' bias zeroed",
        INITIAL,
        "        if convolution:\n            return",
        "        if False:\n            return",
    ),
    Mutant(14, "a token that is not cut", INITIAL, "cut = std if", "cut = 2.0 if"),
    Mutant(15, "keys with a bias", PRESETS, 'qkv_bias="qv"', 'qkv_bias="qkv"'),
    Mutant(
        15,
        "a bias into the decoder",
        PRESETS,
        "predictor_embed_bias=False",
        "predictor_embed_bias=True",
    ),
    Mutant(
        41,
        "errors of masked patches, of other patches",
        OBJECTIVE,
        "masked = None if draws.order is None else draws.order[:, self.visible :]",
        "masked = None if draws.order is None else draws.order[:, self.visible :].flip(1)",
    ),
    Mutant(
        41,
        "predictions left in the order that they were made in",
        OBJECTIVE,
        "prediction = prediction.gather(1, place)",
        "pass",
    ),
    Mutant(41, "put back by the order itself", OBJECTIVE, "order.argsort(1)", "order"),
    Mutant(
        41,
        "queries a patch further, since the class token's row is first",
        PREDICTOR,
        "torch.stack(masks) + first",
        "torch.stack(masks)",
    ),
    Mutant(
        41,
        "a class token at the first patch",
        ENCODER,
        "self.cls_token + self.pos_embed[:, :1]",
        "self.cls_token + self.pos_embed[:, 1:2]",
    ),
    Mutant(
        41,
        "keys with the bias of values",
        BLOCK,
        "torch.zeros_like(self.q_bias), self.v_bias",
        "self.v_bias, torch.zeros_like(self.q_bias)",
    ),
    Mutant(
        50,
        "cosines before sines",
        POSITIONS,
        "np.cos(angle), np.sin(angle)))",
        "np.sin(angle), np.cos(angle)))",
    ),
    Mutant(
        50,
        "a frequency for each channel",
        POSITIONS,
        "(2 * (channel // 2) / dim)",
        "(channel / dim)",
    ),
    Mutant(
        50,
        "positions from 1",
        POSITIONS,
        "np.arange(count)[:, None]",
        "np.arange(1, count + 1)[:, None]",
    ),
    Mutant(
        50,
        "positions that are trained",
        ENCODER,
        "nn.Parameter(table, requires_grad=False)",
        "nn.Parameter(table)",
    ),
)
