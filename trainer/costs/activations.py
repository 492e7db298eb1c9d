"""The bytes of activations that a micro-batch takes in each layer, computed from shapes.

`activation_bytes` are what a layer keeps for its backward pass; `work_bytes` what it takes besides while its passes compute. For a
decoder layer this is most during the backward pass, in the feed-forward or in attention, whichever is computed; for the head in the
forward pass. The formulas follow the code of models/decoder and operators, whose tensors they count.

Under sequence parallelism, a rank holds only its slice of the sequence between blocks, but the whole sequence inside them.

Shapes: T tokens of a micro-batch, H hidden, A width of all heads, C width of keys and values, F feed-forward, E experts, K experts
per token, V vocabulary.
"""

from dataclasses import dataclass, replace

from bagualu.parallel.config import EXPERT_ROWS_MULTIPLE, HEAD_CHUNK_TOKENS
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.models.decoder.lora import FIRST
from bagualu.trainer.models.decoder.shapes import layer_shapes

_BLOCK_ROWS, _BLOCK_ELEMENTS = 2**6, 2**20
"""The most rows, and elements, of the attention weights in a block (operators/attention.py)."""
_TILE_KEYS, _TILE_SPAN, _TILE_ROWS_MULTIPLE = 64, 512, 32
"""The most keys and queries of a tile, and the multiple to which its rows are filled up (operators/tiles.cpp)."""
_INDEX_BYTES = 8
_FLOAT8_BYTES = 1
_CONVERTED_BYTES = 4 + _FLOAT8_BYTES
"""For each element of a matrix that is converted to float8: the float32 quotient by its scale, and the result."""
_ADDED_WIDTH = 8
"""Elements that slopes add to the width of a head, except where attention is computed in blocks (operators/alibi.py)."""


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds in a layer, or in half of one, for one micro-batch; the fields are those of LayerCost."""

    activation_bytes: int
    input_bytes: int
    operand_bytes: int
    work_bytes: int


@dataclass(frozen=True)
class _Block:
    """Bytes of a part of a layer."""

    kept: int
    """For the backward pass."""
    operands: int
    """Of the products that compute weight gradients."""
    last: int
    """Beyond `kept`, at the most, in the backward pass of the last products, while the gradient of the block's output exists."""
    work: int = 0
    """Beyond `kept`, at the most, during the backward pass of what comes before them."""

    def plus(self, factors: tuple[int, int]) -> "_Block":
        """Returns the same with what low-rank factors keep, and the operands of their products."""
        return replace(self, kept=self.kept + factors[0], operands=self.operands + factors[1])


def embedding_held(work: ModelWork) -> Held:
    """Returns the bytes that the embedding holds: as activations the token ids, the positions of a sequence and what a norm after
    it was given, as operands the ids, the positions of all sequences and the gradient of the output. Learned positions are a second
    result in the forward pass."""
    ids, rows = _INDEX_BYTES * work.tokens, work.tokens * work.model.hidden
    learned = work.model.positions == "learned"
    positions = _INDEX_BYTES * work.tokens_between * learned
    gradient = work.tokens_between * work.model.hidden * work.item_bytes
    widened = rows * work.accurate_bytes * (work.item_bytes < work.accurate_bytes)
    if not work.passes_gradients(-1):
        return Held(ids, ids, 0, gradient * learned)
    norm = gradient + _norm_statistics(work) if work.model.embedding_norm else 0
    most = max(gradient + widened + positions, 2 * gradient * learned)
    return Held(
        ids + positions // work.micro_batch + norm,
        ids,
        ids + positions + gradient,
        max(most - norm, gradient + _norm_results(work)) if norm else most,
    )


def head_held(work: ModelWork) -> Held:
    """Returns the bytes that the final norm and the head hold: the norm's input and scale, and the gradients of the loss with
    respect to the head's input and weight, which the forward pass computes. In it the logits of a chunk exist in the dtype of
    products and in at least float32."""
    hidden, item, product, accurate = work.model.hidden, work.item_bytes, work.product_bytes, work.accurate_bytes
    columns = work.model.padded_vocab // work.layout.tensor
    inputs, scales = work.tokens_between * hidden * item, _norm_statistics(work)
    trained = columns * hidden * (("embedding.weight" if work.model.tie_embeddings else "head.weight") not in work.frozen)
    weight = trained * accurate
    widened = (columns + work.tokens) * hidden * product * work.head_copies_operands  # weight, input's gradient
    result = inside_bytes(work)  # the input's gradient; if widened, it is rounded at the end
    highest = _most_of_chunks(work, columns, trained) - weight - result * work.head_copies_operands
    normed = inside_bytes(work) + (inputs if work.sequence else 0)
    # In the norm's backward pass, when those gradients are gone, its result is rounded at the end.
    after = inside_bytes(work) + _norm_results(work) + inputs * (item < accurate) - result - weight
    return Held(inputs + scales + result + weight, inputs, 0, max(highest + normed + widened, after))


def _most_of_chunks(work: ModelWork, columns: int, trained: int) -> int:
    """Returns the most bytes of the weight's gradient, of `trained` elements, and of what the head makes for a chunk of tokens: its
    logits in the dtype of products and in at least float32, then their gradient and what the chunk adds to that of the weight."""
    hidden, product, accurate = work.model.hidden, work.product_bytes, work.accurate_bytes
    narrow = product < accurate  # then a product is rounded before it is added
    highest = 0
    for begin in range(0, work.tokens, HEAD_CHUNK_TOKENS)[:2]:  # all later chunks are like the second
        tokens = min(work.tokens - begin, HEAD_CHUNK_TOKENS)
        logits = tokens * columns * (accurate + product * narrow) + trained * accurate * (begin > 0)
        gradient = tokens * columns * product + trained * (accurate + product * narrow)
        highest = max(highest, max(logits, gradient) + tokens * hidden * product * work.head_copies_operands)
    return highest


def layer_held(work: ModelWork, index: int) -> tuple[Held, Held]:
    """Returns the bytes that a rank holds of one micro-batch in the attention and in the feed-forward of a decoder layer, each with
    its norm."""
    if not work.passes_gradients(index):
        return Held(0, 0, 0, 0), Held(0, 0, 0, 0)
    return _half_held(work, _attention(work, index)), _half_held(work, _second_block(work, index))


def _half_held(work: ModelWork, block: "_Block") -> Held:
    """Returns the bytes that a rank holds in half a layer: a block and its norm."""
    stream = work.tokens_between * work.model.hidden * work.item_bytes
    norm = stream + _norm_statistics(work)
    gathered = inside_bytes(work) if work.sequence else 0  # the gradient of a block's output, for the whole sequence
    if work.model.norm_position == "after":  # the gradient that a norm returns exists besides that of the residual stream
        rounded = stream * (work.item_bytes < work.accurate_bytes)  # the norm's result in the narrower dtype
        highest = max(_norm_results(work) + rounded, gathered + block.last + stream - norm, block.work - norm)
    else:
        highest = max(gathered + block.last, block.work, _norm_work(work) - block.kept)
    return Held(norm + block.kept, stream, block.operands, stream + max(0, highest))


def inside_bytes(work: ModelWork) -> int:
    """Returns the bytes of the input of a block, which is the whole sequence."""
    return work.tokens * work.model.hidden * work.item_bytes


def _norm_statistics(work: ModelWork) -> int:
    """Returns the bytes that a norm keeps besides its input: the scale of each token, and with LayerNorm its mean."""
    return work.tokens_between * work.accurate_bytes * (2 if work.model.norm == "layer" else 1)


def _norm_work(work: ModelWork) -> int:
    """Returns the bytes that the backward pass of a norm before a block takes: the gradient of its output, before and after it is
    summed over the tensor ranks, and what it computes."""
    return inside_bytes(work) * (2 if work.layout.tensor > 1 else 1) + _norm_results(work)


def _norm_results(work: ModelWork) -> int:
    """Returns the bytes that the backward pass of a norm computes at once: the result, on a CPU in at least float32, with input and
    gradient if they are not, and with RMSNorm the product of these two."""
    results = work.tokens_between * work.model.hidden * work.item_bytes
    wide = work.tokens_between * work.model.hidden * work.accurate_bytes
    converted = 2 if work.item_bytes < work.accurate_bytes else 0
    return wide * (1 + converted + (work.model.norm == "rms")) if work.on_cpu else results


def _products(work: ModelWork, elements: int) -> tuple[int, int]:
    """Returns the bytes of (a weight's gradient before it is added to the bucket, the weight in the dtype of products), 0 where a
    kernel needs no such copy. `elements`: of the weight."""
    trained = work.model.lora.rank is None
    if work.in_float8:
        return elements * work.accurate_bytes * trained, elements * _CONVERTED_BYTES
    added = elements * work.operand_bytes if trained and work.copies_gradients else 0
    return added, elements * work.product_bytes if work.copies_operands else 0


def _adapted(work: ModelWork, index: int, block: str) -> int:
    """Returns how many of the weights of layer `index` whose names begin with `block` have low-rank factors."""
    return sum(name.startswith(block) and name.endswith(FIRST) for name in layer_shapes(work.model, index))


def _factors(work: ModelWork, index: int, block: str, rows: int, item_bytes: int) -> tuple[int, int]:
    """Returns the bytes that the low-rank factors of a block of layer `index` keep for the backward pass, and those of the operands
    of their weight gradients, besides the operands that the weights beside them would have. Each pair keeps the input of its second
    factor, of `item_bytes` per element; that and its gradient are the operands."""
    low = rows * _adapted(work, index, block) * (work.model.lora.rank or 0)
    return low * item_bytes, 2 * low * work.product_bytes


def _attention(work: ModelWork, index: int) -> _Block:
    """Kept are the projections' input; query, key and value, on a CPU expanded to all heads unless it is computed in tiles; the
    result; the statistics of the softmax, unless it is computed in blocks; and what norms of query and key were given, with the
    scales of heads."""
    model, tokens, product, accurate = work.model, work.tokens, work.product_bytes, work.accurate_bytes
    in_blocks, in_tiles = work.attends_in_blocks(index), work.attends_in_tiles(index)
    heads, narrow = (width * model.head_width // work.layout.tensor for width in (model.heads, model.key_value_heads))
    own = heads if work.on_cpu and not in_tiles else narrow  # of key and value
    added = _ADDED_WIDTH * (model.positions == "alibi" and not in_blocks)
    wide, wide_own = (width * (model.head_width + added) // model.head_width for width in (heads, own))
    statistics = 0 if in_blocks else tokens * model.heads // work.layout.tensor * accurate
    kept = inside_bytes(work) + tokens * (2 * wide + 2 * wide_own + heads * (added > 0)) * product + statistics
    normed = model.qk_norm * tokens * (heads + narrow)  # elements
    kept += normed * product + (2 * tokens if model.qk_norm_over == "all" else normed // model.head_width) * accurate
    low, operands_of_factors = _factors(work, index, "attention.", tokens, product)
    rounded = _factors(work, index, "attention.output.", tokens, product - work.item_bytes)[0]  # the others stay in that dtype
    kept += low - rounded
    operands = tokens * (2 * model.hidden * work.operand_bytes + (2 * heads + 2 * narrow) * product) + operands_of_factors
    width = tokens * heads
    # Of the result, with what slopes add to it, when the result without that is freed; of query, key and value.
    gradients = (tokens * wide - width * (added > 0)) * product + tokens * (wide + 2 * wide_own) * product
    if in_blocks:  # copies by head of what is not expanded, two also wide; the gradients wide too; no result is kept
        sequences, rows = work.micro_batch * model.heads // work.layout.tensor, min(work.sequence_length, _BLOCK_ROWS)
        keys = min(work.sequence_length, work.keys(index) + _BLOCK_ROWS - 1)
        at_once = min(sequences, max(1, _BLOCK_ELEMENTS // (rows * keys)))
        block = at_once * rows * keys
        # The block before, with fewer keys unless a window limits them; its three tensors exist until the next ones do.
        before = block if keys < work.sequence_length else block - at_once * rows * rows
        narrowed = product if product < accurate else 0  # a copy in the dtype of products
        copies = 4 if narrow == heads else 2  # the gradient of the result takes the place of the result
        blocks = max(2 * accurate * block + (2 * accurate + product) * before,
                     (3 * accurate + narrowed) * block + product * before,
                     (2 * accurate + product) * block + 3 * width * narrowed)  # fmt: skip
        kernel = width * (copies * product + 5 * accurate) + blocks
    else:
        kernel = gradients + (_tiles_workspace(work, narrow < heads) if in_tiles else 0)
    rotated = width * product * 3 + width * (3 * accurate if product < accurate else 2 * product) - width * 4 * product
    summed, widened = _products(work, model.hidden * heads)
    columns = tokens * model.hidden * product * work.copies_operands  # the gradient of the block's output
    rotates = work.on_cpu and model.positions == "rotary"
    return _Block(kept, operands, columns + max(summed, widened), max(kernel, rotated * rotates))


def _tiles_workspace(work: ModelWork, shared: bool) -> int:
    """Returns the bytes in which a thread computes the backward pass of attention in tiles; each further thread takes as many.
    `shared`: whether several query heads share a key."""
    padded, width = -(-work.sequence_length // _TILE_ROWS_MULTIPLE) * _TILE_ROWS_MULTIPLE, work.model.head_width
    span, key_rows = min(padded, _TILE_SPAN), padded if shared else min(padded, _TILE_KEYS)
    whole = padded * width * (5 * 2 + 4) + 2 * padded * 4  # five copies of operands and a gradient, wide; the statistics
    return whole + 2 * key_rows * width * 4 + _TILE_KEYS * span * (2 * 4 + 3 * 2)


def _second_block(work: ModelWork, index: int) -> _Block:
    if work.model.is_moe_layer(index):
        return _mixture(work, index)
    return _feed_forward(work, index, "feed_forward.", work.tokens, work.model.ffn)


def _feed_forward(work: ModelWork, index: int, block: str, rows: int, whole_ffn: int) -> _Block:
    """The feed-forward of a layer or of an expert. Kept are the input and, with a gate, gate, silu(gate) and up, else up and
    gelu(up); the products' operands are their inputs and the gradients of their outputs. The backward pass of the last product
    takes most: its input, once more, that input's gradient and, with a gate, the gradients of its two
    factors. If its weight has low-rank factors, the gradient of the output is gone by then. `block`: what the names of its weights
    begin with; `whole_ffn`: its width on all tensor ranks together."""
    hidden, item, product, gated = work.model.hidden, work.item_bytes, work.operand_bytes, work.model.gated
    ffn = whole_ffn // work.layout.tensor
    added, widened = _products(work, hidden * ffn)
    rank, columns = work.model.lora.rank or 0, rows * hidden * product * work.copies_operands  # the gradient of the output
    # With a gate, the factors' product is an operand of its own; without one, gelu(up) itself is, or its copy in another dtype.
    operand = rows * ffn * product * (gated or work.copies_operands)
    left = rows * rank * product * work.copies_operands if _adapted(work, index, block + "down") else columns
    factors = operand + rows * ffn * (product + 2 * item * gated + item * work.copies_operands) + left
    converted = kept_in_float8 = 0  # the operand, of which the input's gradient still finds a copy
    gradient = rows * ffn * product + widened  # of the operand, with the weight in the dtype of products
    if work.in_float8:
        converted, kept_in_float8 = rows * ffn * _CONVERTED_BYTES, rows * ffn * _FLOAT8_BYTES
        gradient = max(widened, rows * ffn * product + hidden * ffn * _FLOAT8_BYTES)
    matrices = 3 if gated else 2
    # In the products before: input and gradient wide, without an activation; then a product, or at the end the rounded gradient.
    first, last_width = rows * (2 * hidden * product - ffn * item), rank if _adapted(work, index, block + "up") else ffn
    first += max(rows * ffn * product + widened, rows * (last_width * product + hidden * item))
    found = _Block(
        kept=rows * (hidden + matrices * ffn) * item,
        operands=rows * (2 * hidden + matrices * ffn) * product,
        last=max(
            columns + operand + max(converted, kept_in_float8 + added),
            columns + operand + kept_in_float8 + gradient,
            factors + kept_in_float8,
        ),
        work=first if work.copies_operands else 0,
    )
    return found.plus(_factors(work, index, block, rows, item))


def _mixture(work: ModelWork, index: int) -> _Block:
    """Under an even load, the experts of a rank get K rows per token. Kept are the input, the router's probabilities, the order of
    the rows, the experts' activations, and their results, by expert and by token."""
    moe, accurate = work.model.moe, work.accurate_bytes
    rows, own = work.tokens * moe.top_k, inside_bytes(work)
    results, padded = own * moe.top_k, _padded(work, rows)
    experts = _feed_forward(work, index, "feed_forward.experts.", padded, moe.ffn)
    router = work.tokens * moe.experts * accurate + rows * (3 * _INDEX_BYTES + 2 * accurate)
    kept = own + router + experts.kept + 2 * results
    wide_input = work.tokens * work.model.hidden * accurate
    router_trained = f"layers.{index}.feed_forward.router.weight" not in work.frozen
    operands = experts.operands + (work.tokens * moe.experts * accurate + wide_input) * router_trained
    added = (padded - rows) * work.model.hidden * work.item_bytes  # to the gradient of the results
    # In the weighted sum; in the experts, when the results are gone, and then their gradient too.
    highest = max(2 * results, experts.last + added - results, experts.work - 2 * results)
    if moe.shared_experts:
        shared = _feed_forward(work, index, "feed_forward.shared.", work.tokens, moe.shared_experts * moe.ffn)
        kept += shared.kept - own
        operands += shared.operands - wide_input * (router_trained and work.item_bytes == accurate)  # which both read
        highest = max(highest + 2 * own - shared.kept, shared.last, shared.work)
    return _Block(kept, operands, highest)


def _padded(work: ModelWork, rows: int) -> int:
    """Returns how many of `rows`, which are divided evenly over the rank's experts, there are with padding."""
    if not work.on_cpu or work.widens or work.item_bytes == work.accurate_bytes:
        return rows
    experts = work.model.moe.experts // work.layout.expert
    return experts * -(-rows // (experts * EXPERT_ROWS_MULTIPLE)) * EXPERT_ROWS_MULTIPLE
