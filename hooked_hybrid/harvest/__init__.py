"""Chosen activations of many documents, streamed to disk for trainers of sparse autoencoders.

`harvest` writes safetensors shards with an index, `HarvestedActivations` reads them in shuffled
batches, `read_texts` gives the documents of files; `hooked-hybrid harvest` is the command.
"""

from hooked_hybrid.harvest.harvesting import harvest
from hooked_hybrid.harvest.reading import ActivationBatches, HarvestedActivations
from hooked_hybrid.harvest.texts import read_texts

__all__ = ["ActivationBatches", "HarvestedActivations", "harvest", "read_texts"]
