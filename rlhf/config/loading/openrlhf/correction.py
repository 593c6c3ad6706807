"""OpenRLHF's flags on importance correction, in the words of 0.11.2 and in those of the releases before it."""

from rlhf.config.loading.openrlhf.entries import Given, Outcome, plain

PREFIX = "algo.advantage.is_correction_"
OTHER_METHOD = (
    "it filters responses by the mean ratio a token, which algo.correction does not. Use token, or set "
    "algo.correction.type yourself and leave these flags out."
)
SPOILED = ("algo.correction",)
CLIP_NOTE = "only the upper bound holds: smaller weights stay as they are"


def by_level(given: Given) -> Outcome:
    """`is_correction_level` of 0.11.2, with its mode, gating and threshold."""
    level = given.words[0]
    if "algo.correction.type" not in given.known:
        return Outcome(problem="this command has no importance correction. Leave it out.")
    if level == "off":
        return Outcome(settings=(("algo.correction.type", "none"),))
    if level != "token":
        return Outcome(problem=OTHER_METHOD, spoils=SPOILED)
    gating = given.word_of(f"{PREFIX}gating") or "ratio"
    if gating != "ratio":
        text = f"algo.correction looks at ratios only (--{PREFIX}gating {gating}). Use ratio."
        return Outcome(problem=text, spoils=SPOILED)
    return _weights(given, given.word_of(f"{PREFIX}mode") or "mask")


def by_type(given: Given) -> Outcome:
    """`is_correction_enable` of 0.10.2 to 0.11.1, with its type and threshold."""
    if "algo.correction.type" not in given.known:
        return Outcome(problem="this command has no importance correction. Leave it out.")
    kind = given.word_of(f"{PREFIX}type") or "tis"
    if kind not in {"tis", "icepop"}:
        return Outcome(problem=OTHER_METHOD.replace("Use token", "Use tis or icepop"), spoils=SPOILED)
    return _weights(given, "clip" if kind == "tis" else "mask")


def detail(given: Given) -> Outcome:
    """The flags that only say how the correction works."""
    for switch in ("level", "enable"):
        if f"{PREFIX}{switch}" in given.flags:
            return Outcome(nothing=f"read with --{PREFIX}{switch}")
    return Outcome(nothing=f"acts only with --{PREFIX}level or --{PREFIX}enable")


def _weights(given: Given, mode: str) -> Outcome:
    """Weights that are cut at a bound (clip), or that are 0 outside a band (mask)."""
    bounds = [plain([word]) for word in given.flags.get(f"{PREFIX}threshold", ())]
    if mode == "clip":
        cap = (("algo.correction.cap", bounds[-1]),) if bounds else ()
        return Outcome(settings=(("algo.correction.type", "truncate"), *cap), note=CLIP_NOTE)
    if bounds and (len(bounds) != 2 or bounds[0] == "0"):
        text = f"algo.correction of type mask needs a lower bound above 0 (got --{PREFIX}threshold {' '.join(bounds)})."
        return Outcome(problem=text, spoils=SPOILED)
    band = tuple(zip(("algo.correction.low", "algo.correction.high"), bounds, strict=True)) if bounds else ()
    return Outcome(settings=(("algo.correction.type", "mask"), *band))
