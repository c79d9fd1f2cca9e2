"""Code that tests, benchmarks and examples share; it imports none of them.

``budgets`` is the one tolerance rule. ``cases``, ``media_attention``, ``latent_attention`` and
``operators`` have inputs of the ops; ``tiny_model``, ``tiny_run``, ``backbones`` and ``originals``
have small models. ``peers`` imports other projects' code, and ``provenance`` describes the machine.
"""
