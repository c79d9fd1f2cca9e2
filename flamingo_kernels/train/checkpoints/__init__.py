"""Checkpoints of a training run: trained tensors, optimiser, random states, data positions.

A checkpoint is a folder ``step_<number>`` that appears in one rename, and holds no pickle:

``state.json``
    The step, the fingerprints of the base model, and every process's data positions.
``model.safetensors``, ``optimizer.safetensors``
    Written by the first process when each holds a whole model (``whole``). The first is what
    ``FlamingoModel.from_pretrained`` reads, with trained tensors in float32. The second holds the
    optimiser's moments and the random states.
``shard-*.safetensors``
    Written in place of those two, one by each process, when the model is sharded (``sharded``).

``folder`` makes and lists the folders, ``state`` reads ``state.json``, ``contents`` names the
tensors of both kinds, and ``export`` makes one file of either.
"""
