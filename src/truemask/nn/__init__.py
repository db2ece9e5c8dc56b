"""The modules: plain `torch.nn` blocks that know masks and `attend`. The public names are in `truemask`, but for
`MultiheadAttention`, a drop-in for torch's, which has torch's name for its place.

Names, keywords, defaults and initial weights are x-transformers' (2.31), and the same weights give the same numbers
(`tests/nn/test_parity_x_transformers.py`). Where this library means something else on purpose:

| here                                                        | x-transformers                                        |
|-------------------------------------------------------------|-------------------------------------------------------|
| `attn_flash=True` is the default and changes no meaning     | `False`; with flash `causal=False` is ignored         |
| query heads share key heads in blocks (LLaMA)               | round-robin: head h reads key head h % kv_heads       |
| a row that may read nothing gets zeros                      | may get the average of all values, future included    |
| `mask` and `attn_mask` may be expressions; both are ANDed   | tensors only                                          |
| a 3-D `attn_mask` is (h, q, k) if it can be nothing else    | always (h, q, k), also when it was (b, q, k)          |
| `mask` and `attn_mask` are checked, and warned about        | used as they come                                     |
| masks work with a cache, memories and registers             | refused, or a crash                                   |
| registers of a `Decoder` read all registers, no token       | register i reads registers up to i                    |
| registers read a token only if every query but padding may, | whatever `mask` shows                                 |
| and padding reads no register that reads tokens             |                                                       |
| positions restart in packed and padded documents            | `seq_start_pos`, not with registers                   |
| angles of rotary are computed in fp32 always                | in the model's dtype after `.bfloat16()`              |
| `alibi_pos_bias` counts the mask's positions, which restart | places in the input or the caller's `pos`; registers  |
| with documents and padding; registers, memories: refused    | counted, memories at distance 0                       |
| `ff_no_bias` leaves no bias                                 | the gated projection keeps one                        |
| attention always projects its output, also for one head     | not if `heads=1`                                      |
| `attn_qk_norm` and `attn_qk_rmsnorm` exclude each other     | both are applied                                      |
| `ff_swish` and `ff_relu_squared` exclude each other         | `ff_relu_squared` wins                                |
| RMSNorm divides by sqrt(mean(x * x) + 1e-8)                 | by max(norm(x), 1e-12) / sqrt(d)                      |
| keywords are one value for all layers                       | a tuple may give one to each                          |
| `generate` samples from the whole distribution; `top_k=` ...| top 10 % of the vocabulary unless told otherwise      |
| `generate` always returns [b, seq_len], padded behind an eos| shorter if all rows end; an eos in the prompt counts  |
| `generate` refuses to pass an absolute max_seq_len          | slides without a cache, fails with one                |
| the loss skips padding and the first token of a document    | only `ignore_index`                                   |

Nouns: a *block* (one layer of a stack), the *mask of a forward* (all that a caller passed, as one expression), a
*register*. Nothing that generates or trains comes in. The words: docs/internals/glossary.md.
"""

from truemask.nn.multihead import MultiheadAttention as MultiheadAttention
