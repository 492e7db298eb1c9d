"""Manifests as they are written, and as somebody else might: whatever a field says, an error of one line and nothing run."""

import copy
import json
import os
import pickle
import tracemalloc

import pytest
import torch
from conftest import tensors

from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, digest
from bagualu.fault_tolerance.checkpoint.layout.manifest import read_manifest
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint

NOTHINGS = (None, True, -1, 1.5, 2**63, 2**70, 10**18, "", "x", "../x", [], [[]], {}, {"a": 1})


def document(path):
    """The manifest as plain JSON: it is one document, lines or not."""
    return json.loads((path / "manifest.json").read_bytes())


def forge(path, content, tables):
    """Write a manifest whose every hash is right. `tables` are [(name, fields)], told of in the content where that has a place."""
    lines = [json.dumps(fields, separators=(",", ":")).encode() + b",\n" for _, fields in tables]
    lines[-1] = lines[-1][:-2] + b"\n"
    for (name, _), line in zip(tables, lines, strict=True):
        entry = content["tensors"].get(name) if isinstance(content, dict) and isinstance(content.get("tensors"), dict) else None
        if isinstance(entry, list) and len(entry) == 4 and entry[2:] == ["length", "hash"]:
            entry[2:] = [len(line), digest(line)]
    raw = json.dumps(content, separators=(",", ":")).encode()
    head = b'{"hash":"' + digest(raw).encode() + b'","content":' + raw + b',"tables":[\n'
    (path / "manifest.json").write_bytes(b"".join([head, *lines, b"]}\n"]))


def taken_apart(path):
    """Content and tables for `forge`."""
    whole = document(path)
    content, tables = whole["content"], [(fields["tensor"], fields) for fields in whole["tables"]]
    for entry in content["tensors"].values():
        entry[2:] = ["length", "hash"]
    return content, tables


def places(value, at=()):
    """Where a value of a JSON document can be put in the place of another."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*at, index))


def put(value, at, new):
    """A copy of `value` with `new` at the place."""
    if not at:
        return new
    value = copy.copy(value)
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


def read_all(path):
    """Every tensor of the model, which has no others, as the trainer does it. Raises CheckpointError."""
    checkpoint = Checkpoint(path)
    outs = {name: torch.empty_like(tensor) for name, tensor in tensors(10).items()}
    if checkpoint.tensors != {name: (tuple(out.shape), out.dtype) for name, out in outs.items()}:
        raise CheckpointError("it holds other tensors")
    for name, out in outs.items():
        checkpoint.read(name, (0,) * out.dim(), out)
    return outs


def test_it_is_one_json_document_whose_first_line_is_enough(tmp_path, save_step, model):
    path = save_step(tmp_path, 10, 2)[0]
    whole = document(path)
    assert whole["content"]["tensors"].keys() == {table["tensor"] for table in whole["tables"]} == model(10).keys()
    manifest = read_manifest(path)
    raw = (path / "manifest.json").read_bytes()
    at = raw.index(b'{"tensor":"weight/a"')
    (path / "manifest.json").write_bytes(raw[:at] + raw[at:].replace(b"offsets", b"offsetz", 1))
    assert manifest.tensors["half/b"].shape == (5,)
    assert len(read_manifest(path).tensors["half/b"].boxes) == 2  # another's table is as good as it was
    with pytest.raises(CheckpointError, match=r"the table of tensor weight/a does not match its hash \(bytes \d+ to \d+\)"):
        len(read_manifest(path).tensors["weight/a"].boxes)


def test_forging_what_was_there_gives_what_was_there(tmp_path, save_step, model):
    path = save_step(tmp_path, 10, 2)[0]
    raw = (path / "manifest.json").read_bytes()
    forge(path, *taken_apart(path))
    assert (path / "manifest.json").read_bytes() == raw
    assert all(torch.equal(out, model(10)[name]) for name, out in read_all(path).items())


def test_any_field_may_be_anything(tmp_path, save_step):
    """Each place of the document in turn holds each of some values; every hash is right, so only the checks stand in the way."""
    path = save_step(tmp_path, 10, 2)[0]
    content, tables = taken_apart(path)
    forged = [(put(content, at, new), tables) for new in NOTHINGS for at in places(content) if at[:1] != ("metadata",)]
    for number, (name, fields) in enumerate(tables):
        others = tables[:number], tables[number + 1 :]
        forged += [(content, [*others[0], (name, put(fields, at, new)), *others[1]]) for new in NOTHINGS for at in places(fields)]
    for number, changed in enumerate(forged):
        if json.dumps(changed) == json.dumps((content, tables)):
            continue
        forge(path, copy.deepcopy(changed[0]), changed[1])
        with pytest.raises(CheckpointError) as error:
            read_all(path)
        assert "\n" not in str(error.value)
        assert number % 20 or verify(path)
    assert len(forged) > 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "manifest.json"),
        (b"1" * 10_000, "manifest.json"),
        (b'{"format":2', "manifest.json"),
        (b"\xff\xfe", "manifest.json"),
        (b'{"format":1}', "another format than 2"),
        (b"null", "another format than 2"),
    ],
)
def test_json_that_is_none_or_far_too_deep(tmp_path, save_step, content, message):
    path = save_step(tmp_path, 10)[0]
    head = b'{"hash":"' + digest(content).encode() + b'","content":' + content + b',"tables":[\n]}\n'
    (path / "manifest.json").write_bytes(head)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "a/b", "", "a\0b", "manifest.json", ".hidden"])
def test_a_file_elsewhere_is_never_opened(tmp_path, save_step, name):
    path = save_step(tmp_path, 10)[0]
    content, tables = taken_apart(path)
    content["files"] = {name: content["files"]["rank-00000.safetensors"]}
    (path.parent / "secret").write_bytes((path / "rank-00000.safetensors").read_bytes())
    forge(path, content, tables)
    with pytest.raises(CheckpointError, match="which is not a valid name of a shard"):
        Checkpoint(path)


@pytest.mark.parametrize("victim", ["manifest.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("kind", ["link", "loop", "fifo", "folder", "device"])
def test_links_pipes_and_devices_are_no_files(tmp_path, save_step, victim, kind):
    path = save_step(tmp_path, 10)[0]
    file = path / victim
    file.rename(tmp_path / "moved")
    make = {"link": lambda: file.symlink_to(tmp_path / "moved"), "loop": lambda: file.symlink_to(file),
            "fifo": lambda: os.mkfifo(file), "folder": file.mkdir, "device": lambda: file.symlink_to("/dev/zero")}  # fmt: skip
    make[kind]()
    with pytest.raises(CheckpointError, match="symbolic link" if kind in ("link", "loop", "device") else "not a regular file"):
        read_all(path)
    assert verify(path)


def test_absurd_sizes_take_no_memory(tmp_path, save_step):
    """Sparse files of a terabyte, and a manifest that tells of them."""
    path = save_step(tmp_path, 10)[0]
    shard, tera = path / "rank-00000.safetensors", 2**40
    content, tables = taken_apart(path)
    os.truncate(shard, tera)
    entry = content["files"]["rank-00000.safetensors"]
    changes = [("header", {"files": {"rank-00000.safetensors": [tera, tera, entry[2]]}}),
               ("block", {"files": {"rank-00000.safetensors": [tera, *entry[1:]]}, "block_bytes": tera})]  # fmt: skip
    tracemalloc.start()
    for _, change in changes:
        forge(path, copy.deepcopy({**content, **change}), tables)
        with pytest.raises(CheckpointError):
            read_all(path)
    os.truncate(path / "manifest.json", 2**36)
    with pytest.raises(CheckpointError):
        read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


class _Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("forged", [False, True])
def test_a_pickle_under_another_name_is_never_run(tmp_path, save_step, forged):
    path = save_step(tmp_path, 10)[0]
    marker, shard = tmp_path / "ran", path / "rank-00000.safetensors"
    size = shard.stat().st_size
    raw = pickle.dumps(_Payload(str(marker)))
    shard.write_bytes(raw.ljust(size, b"\0"))
    if forged:  # the manifest tells of just these bytes, every hash right
        content, tables = taken_apart(path)
        entry = content["files"][shard.name]
        entry[2] = digest(shard.read_bytes()[: entry[1]])
        for _, fields in tables:
            sizes = [len(hashes) // 32 for hashes in fields["hashes"]]
            assert sizes == [1]
            end = sorted([start for _, f in tables for start in f["starts"]] + [size])
            begin = fields["starts"][0]
            stop = end[end.index(begin) + 1]
            fields["hashes"] = [digest(shard.read_bytes()[begin:stop])]
        forge(path, content, tables)
        read_all(path)  # bytes like any others
    else:
        with pytest.raises(CheckpointError, match="does not match its hash"):
            read_all(path)
    assert not marker.exists()


def test_bytes_of_two_tensors_or_of_none_are_told_by_verify(tmp_path, save_step):
    path = save_step(tmp_path, 10)[0]
    content, tables = taken_apart(path)
    named = dict(tables)
    named["weight/a"] = {**named["weight/a"], "starts": [named["weight/a"]["starts"][0] - 8]}
    forge(path, content, list(named.items()))
    assert any("belong to two tensors" in problem for problem in verify(path))
    assert any("belong to no tensor" in problem for problem in verify(path))
