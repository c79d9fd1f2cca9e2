"""Models that ship with the package, folders for ``FlamingoModel.from_pretrained``."""

from pathlib import Path

# What examples/fast_binding trains: it names drawn or handwritten things by examples in the prompt,
# as in ``<image>dax<EOC><image>wug<EOC><image>``.
FAST_BINDING = Path(__file__).parent / "fast_binding"
# Digits that no stage of its training has seen.
FAST_BINDING_NEW_DIGITS = (1, 3, 5, 7, 9)
