from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.order import Order
from bagualu.trainer.data.tokenised import Corpus

S = 4
seeds = st.integers(-(2**40), 2**64 - 1)


def batches(sequences: int, global_batch: int, seed: int, source: str = "text", vocab: int = 65536) -> Batches:
    """Sequence i of either split reads tokens i * S .. i * S + S, and token t is the number t."""
    tokens = np.arange(sequences * S + 1 + S // 2, dtype=np.uint32)
    corpus = Corpus(vocab, tokens, tokens, np.ones(vocab, np.int64), "fingerprint", None)
    return Batches(corpus, DataConfig(source=source, sequence_length=S, global_batch=global_batch), seed)


@given(st.integers(1, 40), st.integers(1, 50), seeds)
def test_every_epoch_reads_every_sequence_exactly_once(sequences, global_batch, seed):
    epochs = 3
    steps = -(-epochs * sequences // global_batch)
    data = batches(sequences, global_batch, seed)
    assert data.train_count == sequences
    ids = np.concatenate([data.sample_ids(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(ids[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))


def test_epochs_and_seeds_differ_in_order():
    orders = [batches(50, 50, seed).sample_ids(step).tolist() for seed in (0, 1, 2**64 - 1) for step in (0, 1)]
    orders.append(list(range(50)))
    assert len({tuple(order) for order in orders}) == len(orders)


def test_every_order_of_a_few_is_as_likely_as_any_other():
    orders = [tuple(batches(4, 4, seed).sample_ids(0)) for seed in range(2400)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 49.7  # chi squared of 23 degrees of freedom, 1 in 1,000


def test_every_sequence_may_come_at_every_place():
    counts = np.zeros((50, 50))
    for seed in range(1000):
        counts[np.arange(50), batches(50, 50, seed).sample_ids(0)] += 1
    assert ((counts - 20) ** 2 / 20).sum() < 2622  # chi squared of 49 * 49 degrees of freedom, 1 in 1,000


def test_a_corpus_of_any_size_is_shuffled_without_listing_it():
    data = batches(1, 64, seed=1)
    data._sources[0] = replace(data._sources[0], order=Order(10**15, seed=1))
    ids = data.sample_ids(10**9)
    assert len(set(ids)) == 64
    assert 0 <= ids.min() < ids.max() < 10**15


def test_the_order_is_fixed_for_good():
    """A change here breaks the resume of every run there is."""
    assert batches(8, 8, seed=0).sample_ids(0).tolist() == [1, 4, 7, 5, 3, 0, 2, 6]
    assert batches(3, 3, seed=7, source="random", vocab=100).batch(0, 0, 1)[0].tolist() == [[83, 13, 45, 44]]


@given(st.data(), st.sampled_from(["text", "random"]), st.integers(1, 20), st.integers(1, 24), seeds, st.integers(0, 9))
def test_however_a_step_is_cut_it_is_the_same_step(data, source, sequences, global_batch, seed, step):
    whole_inputs, whole_labels = batches(sequences, global_batch, seed, source).batch(step, 0, global_batch)
    cuts = sorted({0, global_batch, *data.draw(st.lists(st.integers(0, global_batch)))})
    parts = [
        batches(sequences, global_batch, seed, source).batch(step, start, end - start)  # each rank has its own
        for start, end in pairwise(cuts)
    ]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole_inputs)
    assert torch.equal(torch.cat([labels for _, labels in parts]), whole_labels)


@given(st.sampled_from(["text", "random"]), st.integers(1, 20), st.integers(1, 24), seeds, st.integers(0, 30))
def test_jumping_to_a_step_is_walking_there(source, sequences, global_batch, seed, step):
    walker = batches(sequences, global_batch, seed, source)
    for each in range(step + 1):
        walked = walker.batch(each, 0, global_batch)
    jumped = batches(sequences, global_batch, seed, source).batch(step, 0, global_batch)
    assert torch.equal(walked[0], jumped[0])
    assert torch.equal(walked[1], jumped[1])


def test_labels_are_the_next_tokens():
    data = batches(10, 6, seed=3)
    inputs, labels = data.batch(1, 2, 3)
    ids = torch.from_numpy(data.sample_ids(1)[2:5])
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.is_contiguous()
    assert labels.is_contiguous()
    assert torch.equal(inputs, ids[:, None] * S + torch.arange(S))
    assert torch.equal(labels, inputs + 1)


def test_validation_goes_through_the_files_in_order_whatever_the_seed():
    data = batches(5, 2, seed=3)
    assert data.validation_count == 5
    inputs, labels = data.validation(0, 5)
    assert inputs.flatten().tolist() == list(range(5 * S))
    assert labels.flatten().tolist() == list(range(1, 5 * S + 1))
    assert torch.equal(data.validation(3, 2)[0], inputs[3:])


def test_random_tokens_are_uniform_and_new_every_time():
    data = batches(1, 64, seed=5, source="random", vocab=7)
    tokens = torch.cat([data.batch(step, 0, 64)[0] for step in range(40)])
    assert torch.bincount(tokens.flatten(), minlength=7).tolist() == pytest.approx([len(tokens) * S / 7] * 7, rel=0.15)
    assert len({tuple(row) for row in batches(1, 64, 5, "random").batch(0, 0, 64)[0].tolist()}) == 64
    assert not torch.equal(data.validation(0, 64)[0], data.batch(0, 0, 64)[0])


def test_samples_outside_the_batch_are_refused():
    data = batches(5, 4, seed=0)
    for start, count in ((-1, 1), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="outside the global batch of 4"):
            data.batch(0, start, count)
    with pytest.raises(ValueError, match="outside the 5 there are"):
        data.validation(4, 2)


def test_a_corpus_shorter_than_a_sequence_is_refused():
    short = np.arange(S, dtype=np.uint16)
    corpus = Corpus(300, np.arange(100, dtype=np.uint16), short, np.ones(300, np.int64), "fingerprint", None)
    with pytest.raises(RecipeError, match=r"validation split .* has 4 tokens .* give data\.sequence_length=3 or"):
        Batches(corpus, DataConfig(source="text", sequence_length=S), seed=0)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_token_beyond_the_vocabulary_is_refused_whoever_reads_it(split):
    """A label that no row of the head stands for would add to the loss as if it were right."""
    tokens = np.zeros(8 * S + 1, np.uint16)
    tokens[5 * S + 2] = 300
    corpus = Corpus(300, tokens, tokens, np.ones(300, np.int64), "fingerprint", None)
    for count in (1, 2, 4):  # over 8, 4 and 2 ranks
        data = Batches(corpus, DataConfig(source="text", sequence_length=S, global_batch=8), seed=0)
        errors = set()
        for start in range(0, 8, count):
            try:
                data.batch(0, start, count) if split == "training" else data.validation(start, count)
            except RecipeError as error:
                errors.add(str(error))
        assert len(errors) == 1
        assert "sequence 5 of data.source=text has token 300, but model.vocab=300" in errors.pop()
