"""The glossary: what each dimension is called here, in the papers and in Hugging Face's code.

    =============  ======================================================  =========================
    ours           meaning                                                 elsewhere
    =============  ======================================================  =========================
    batch          rows of one forward
    pos            positions (tokens) of one forward; chunks included      L, T, seq_len
    query, key     the same two axes of attention; key = cached + new
    d_model        width of the residual stream                            hidden_size, width
    d_vocab        tokens in the vocabulary                                vocab_size
    head, kv_head  query heads; key and value heads                        num_heads, num_kv_heads
    d_head         channels of one head                                    head_dim
    d_mlp          width of an MLP                                         intermediate_size (RG /2)
    d_rnn          channels of an RG-LRU                                   lru_width
    d_inner        channels of a Mamba block                               intermediate_size (Mamba)
    d_state, n     states of each channel of a Mamba block                 ssm_state_size
    dt_rank        rank of the projection to step sizes                    time_step_rank
    expert         experts of a mixture; n_chosen of them act on a token   num_experts, top_k
    gate_block     blocks of the RG-LRU's block-diagonal gates             num_heads (Google)
    tap            taps of the causal convolution, the last one is "now"   conv1d_width
    =============  ======================================================  =========================

Units: entropy in bits, losses and log-probabilities in nats, lengths in tokens, sizes in bytes.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Positions = Int[Tensor, "batch pos"]
Resid = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch pos d_vocab"]
Queries = Float[Tensor, "batch query head d_head"]
KeysValues = Float[Tensor, "batch key kv_head d_head"]
Pattern = Float[Tensor, "batch head query key"]
Mask = Bool[Tensor, "#batch query key"]
Inner = Float[Tensor, "batch pos d_inner"]
Channels = Float[Tensor, "batch pos d_rnn"]
