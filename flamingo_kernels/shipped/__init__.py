"""Models that ship with the package: folders for ``FlamingoModel.from_pretrained``."""

from pathlib import Path

# The model that examples/fast_binding trains. It names drawn or handwritten things by examples in
# the prompt, such as ``<image>kip<EOC><image>zov<EOC><image>``.
FAST_BINDING = Path(__file__).parent / "fast_binding"
# Drawings of glyphs that no stage of its training has seen, white on black. Each row is a class,
# and each drawing is as high and as wide as the model's pictures.
FAST_BINDING_GLYPHS = FAST_BINDING / "glyphs.png"
