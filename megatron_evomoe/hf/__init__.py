"""Conversion between checkpoints and Hugging Face directories, and EvoMoE's classes for transformers.

* `from_hf`: a Hugging Face model becomes a checkpoint.
* `to_hf`: a checkpoint becomes a Hugging Face directory.
* `tensor_map`: which tensor of the one is which tensor of the other, for both directions.
* `remote_code`: the model classes, which a directory with custom code carries along.

`register` makes transformers load exported directories with the installed classes. Neither importing this
package nor converting needs transformers.
"""

from megatron_evomoe.hf.registration import register

__all__ = ["register"]
