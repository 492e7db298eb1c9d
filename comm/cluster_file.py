"""Reads clusters from YAML files: recipes/cluster/*.yaml, or files of the user. A recipe names one by `cluster=NAME`.

A file describes a cluster of one kind of chip (`chip`, `tiers`, ...) or a machine whose processors its ranks share (`ranks`), or it
joins other clusters into a mixed one (`parts`, `joint`).
docs/design/clusters.md lists the keys. Errors name the file, the key and what to give.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from bagualu.comm.cost import ALGORITHMS, KINDS
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip, Cluster, ClusterPart, LinkTier, OperatorTime, ShapeEfficiency, Storage

_Read = TypeVar("_Read", Chip, LinkTier, Storage, ShapeEfficiency, OperatorTime)
_SHARED = ("ranks", "failures_per_device_hour", "quick")
_SINGLE = ("chip", "tiers", "start_seconds", "devices", "node_devices", "algorithms", "storage", *_SHARED[1:])
_OF_RANKS = ("chip", "tiers", "start_seconds", "storage")
_MIXED = ("parts", "joint", "start_seconds", "algorithms", "storage")
_NO_LINKS = LinkTier("none", 0.0, math.inf)
"""The links of a rank that is alone."""
THIS = "this"
"""The name of the cluster that `bagualu doctor` measures and writes into the cache folder."""
_EXAMPLES = {
    "chip": "a section with name, vendor, matmul_flops_per_second, ...",
    "tiers": "a section with one section per tier of links, from the innermost",
    "joint": "a section with latency_seconds and bytes_per_second of the links between the parts",
    "start_seconds": "start_seconds: 1.0e-05",
}


def cluster_names(folders: Sequence[Path] = ()) -> list[str]:
    """Returns the names that `cluster=` takes: of Bagualu's own files and of those in `folders`. `this` is there only once it
    has been measured."""
    own = [entry.name for entry in (files("bagualu.recipes") / "cluster").iterdir()]
    names = [*own, *(entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir())]
    return sorted({name.removesuffix(".yaml") for name in names if name.endswith(".yaml")})


def load_cluster(name: str, folders: Sequence[Path] = ()) -> Cluster:
    """Returns the cluster `name`: a file that ends in .yaml, or the name of a file in `folders` or of Bagualu's own.

    Raises RecipeError, a single line with the fix, if there is no such cluster or if its file has a missing, unknown or invalid
    key.
    """
    path = _path(name, folders)
    return read_cluster(_document(path), path.stem, str(path), folders)


def read_cluster(values: Any, name: str, source: str, folders: Sequence[Path] = ()) -> Cluster:
    """Returns the cluster that `values`, the content of a file, describes; `source` is the file for error messages.

    Raises RecipeError as `load_cluster` does.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{source}: the file must hold keys and values; give chip, tiers, ...")
    top = _Section(source, "", values)
    if "ranks" in values:
        return _shared(top, name)
    mixed = "parts" in values
    top.check_keys(_MIXED if mixed else _SINGLE)
    parts = _parts(top.filled("parts"), folders) if mixed else (_part(top),)
    return Cluster(
        name=name,
        parts=parts,
        start_seconds=top.number("start_seconds"),
        joint=_joint(top.section("joint")) if mixed else None,
        algorithms=_algorithms(top),
        storage=_storage(top),
        quick=top.truth("quick"),
    )


def _shared(top: "_Section", name: str) -> Cluster:
    """Returns a machine whose processors its ranks share: `ranks` has a section for each number of ranks."""
    top.check_keys(_SHARED)
    sections = top.section("ranks").values
    if not sections or not all(isinstance(number, int) and number >= 1 for number in sections):
        raise top.refuse(
            "ranks", "must have a section for each number of ranks, e.g. 2: {chip: ..., tiers: ..., start_seconds: ...}"
        )
    by_ranks = {}
    for number, values in sections.items():
        section = _Section(top.source, f"ranks.{number}", values)
        section.check_keys(_OF_RANKS)
        alone = number == 1 and not section.gives("tiers")
        part = ClusterPart(
            chip=section.section("chip").read(Chip),
            tiers=(_NO_LINKS,) if alone else _tiers(section.filled("tiers")),
            devices=number,
            failures_per_device_hour=_failures(top),
        )
        start = 0.0 if alone and not section.gives("start_seconds") else section.number("start_seconds")
        by_ranks[number] = Cluster(name, (part,), start, storage=_storage(section), quick=top.truth("quick"))
    return replace(by_ranks[max(by_ranks)], by_ranks=by_ranks)


def _path(name: str, folders: Sequence[Path]) -> Path:
    """Returns the file of a cluster. Raises RecipeError if there is none."""
    known = cluster_names(folders)
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise RecipeError(f"cluster={name} is no file; give one of {', '.join(known)}, or a .yaml file")
        return Path(name)
    if name not in known:
        if name == THIS:
            raise RecipeError("cluster=this has not been measured yet; run bagualu doctor")
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean cluster={near[0]}? " if near else ""
        raise RecipeError(f"cluster={name} is unknown; {hint}There are {', '.join(known)}; or give a .yaml file")
    own = Path(str(files("bagualu.recipes") / "cluster"))
    return next(path for folder in (*folders, own) if (path := folder / f"{name}.yaml").is_file())


def _document(path: Path) -> Any:
    """Returns the content of a YAML file. Raises RecipeError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it") from error


class _Section:
    """A mapping of a file, with the key under which it stands there."""

    def __init__(self, source: str, key: str, values: Any) -> None:
        self.source, self.key, self.values = source, key, values
        if not isinstance(values, Mapping):
            raise RecipeError(f"{source}: {key}={values} must be a section with keys of its own")

    def full(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key else key

    def refuse(self, key: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.source}: {self.full(key)}={self.values[key]} {problem}")

    def check_keys(self, known: Sequence[str]) -> None:
        """Raises RecipeError for a key that is not in `known`."""
        for key in self.values:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {self.full(near[0])}?" if near else f"there are {', '.join(known)}"
                raise RecipeError(f"{self.source}: unknown key {self.full(key)}; {hint}")

    def gives(self, key: str) -> bool:
        return self.values.get(key) is not None

    def needs(self, key: str, example: str) -> None:
        """Raises RecipeError if `key` is missing."""
        if not self.gives(key):
            raise RecipeError(f"{self.source}: {self.full(key)} is missing; give {example}")

    def section(self, key: str) -> "_Section":
        self.needs(key, _EXAMPLES.get(key, f"a section {key}"))
        return _Section(self.source, self.full(key), self.values[key])

    def filled(self, key: str) -> "_Section":
        """Returns a section in which the file chooses the keys. Raises RecipeError if it has none, or if one is not text."""
        section = self.section(key)
        if not section.values or not all(isinstance(name, str) for name in section.values):
            raise self.refuse(key, "must have keys of its own, which are text")
        return section

    def number(self, key: str, least: float = 0.0, most: float = math.inf, example: str | None = None) -> float:
        """Returns a number above 0, from `least` to `most`. Raises RecipeError if it is missing or none such."""
        self.needs(key, example or _EXAMPLES.get(key, f"a number above 0, e.g. {key}: 1.0"))
        value = self.values[key]
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise self.refuse(key, "must be a finite number above 0" + (f", e.g. {example}" if example else ""))
        if not least <= number <= most:
            raise self.refuse(key, f"must be at least {least:g}" if number < least else f"must be at most {most:g}")
        return number

    def whole(self, key: str, example: str | None = None) -> int:
        """Returns a whole number of at least 1. Raises RecipeError if it is missing or none such."""
        number = self.number(key, example=example)
        if number != int(number):
            raise self.refuse(key, f"must be a whole number, e.g. {key}: {max(1, round(number))}")
        return int(number)

    def truth(self, key: str) -> bool:
        """Returns whether `key` is true; false if it is missing. Raises RecipeError if it is neither."""
        if not isinstance(self.values.get(key) or False, bool):
            raise self.refuse(key, "must be true or false")
        return bool(self.values.get(key))

    def numbers(self, key: str) -> dict[str, float]:
        """Returns the numbers above 0 of a section, by key."""
        inner = self.filled(key)
        return {str(name): inner.number(name) for name in inner.values}

    def read(self, kind: type[_Read], **given: Any) -> _Read:
        """Returns an instance of the dataclass `kind`, whose fields are the keys of this section, but for those `given`."""
        own = [field for field in fields(kind) if field.name not in given]
        self.check_keys([field.name for field in own])
        hints = get_type_hints(kind)
        present = [field for field in own if _required(field) or self.gives(field.name)]
        return kind(**given, **{field.name: self._value(field, hints[field.name]) for field in present})

    @staticmethod
    def _relative(section: "_Section") -> dict[str, float]:
        """Returns a number for each kind of communication that the section names."""
        section.check_keys(tuple(KINDS))
        return {kind: section.number(kind) for kind in section.values}

    def _choice(self, key: str, values: Sequence[str]) -> str:
        """Returns one of `values`. Raises RecipeError if it is another."""
        if self.values[key] not in values:
            raise self.refuse(key, f"must be {' or '.join(values)}")
        return str(self.values[key])

    def _value(self, field: Field[Any], hint: Any) -> Any:
        if field.name == "efficiency":
            return _rows(self.filled("efficiency"), ShapeEfficiency, "[{m: 4096, n: 4096, k: 4096, fraction: 0.8}]")
        if field.name == "relative":
            return self._relative(self.filled("relative"))
        if field.name == "type":
            return self._choice("type", ("cpu", "cuda"))
        if field.name == "operators":
            return _rows(self.filled("operators"), OperatorTime, "[{dtype: bfloat16, work: 2097152, seconds: 1.0e-04}]")
        example = field.metadata.get("example")
        example = f"{field.name}: {example}" if example else None
        if hint is str:
            self.needs(field.name, str(example))
            return str(self.values[field.name])
        if field.name == "matmul_flops_per_second":
            self.needs(field.name, str(example))
            return self.numbers(field.name)
        if hint is int or int in get_args(hint):
            return self.whole(field.name, example)
        return self.number(field.name, field.metadata.get("least", 0.0), field.metadata.get("most", math.inf), example)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _rows(section: _Section, kind: type[_Read], example: str) -> dict[str, tuple[_Read, ...]]:
    """Returns, for each key of `section`, a list of instances of the dataclass `kind`."""
    tables = {}
    for name, rows in section.values.items():
        if not isinstance(rows, list) or not rows:
            raise section.refuse(name, f"must be a list, e.g. {example}")
        sections = [_Section(section.source, f"{section.full(name)}[{index}]", row) for index, row in enumerate(rows)]
        tables[str(name)] = tuple(row.read(kind) for row in sections)
    return tables


def _algorithms(top: _Section) -> tuple[str, ...]:
    """Returns the algorithms of the collective library. Raises RecipeError if one is unknown, or if none works for every kind."""
    chosen = top.values.get("algorithms")
    if chosen is None:
        return ()
    unknown = [name for name in chosen if name not in ALGORITHMS] if isinstance(chosen, list) else [chosen]
    if unknown or not {"ring", "rings"} & set(chosen):
        raise top.refuse("algorithms", f"must be a list of {', '.join(ALGORITHMS)} with ring or rings, e.g. [rings, tree]")
    return tuple(chosen)


def _part(top: _Section) -> ClusterPart:
    """Returns the only part of a cluster with one kind of chip."""
    return ClusterPart(
        chip=top.section("chip").read(Chip),
        tiers=_tiers(top.filled("tiers")),
        devices=top.whole("devices") if top.gives("devices") else None,
        node_devices=top.whole("node_devices") if top.gives("node_devices") else None,
        failures_per_device_hour=_failures(top),
    )


def _failures(top: _Section) -> dict[str, float]:
    return top.numbers("failures_per_device_hour") if top.gives("failures_per_device_hour") else {}


def _storage(top: _Section) -> Storage | None:
    return top.section("storage").read(Storage) if top.gives("storage") else None


def _tiers(section: _Section) -> tuple[LinkTier, ...]:
    """Returns the tiers of links. Raises RecipeError if one does not consist of whole domains of the tier below it."""
    tiers = tuple(section.section(name).read(LinkTier, name=str(name)) for name in section.values)
    below = 1
    for tier in tiers[:-1]:
        inner = section.section(tier.name)
        devices = inner.whole("devices", "devices: 8, or leave out the tiers after this one")
        if devices % below or devices == below:
            raise inner.refuse("devices", f"must be a larger multiple of {below}, the devices of the tier below it")
        below = devices
    if tiers[-1].devices is not None:
        raise section.section(tiers[-1].name).refuse("devices", "is of the last tier, which joins all devices; leave it out")
    for tier in tiers[1:]:
        if tier.peer_bytes_per_second is not None:
            raise section.section(tier.name).refuse("peer_bytes_per_second", "is for the first tier only; leave it out")
    return tiers


def _joint(section: _Section) -> LinkTier:
    """Returns the links between the parts of a mixed cluster."""
    for key in ("devices", "peer_bytes_per_second"):
        if section.gives(key):
            raise section.refuse(key, "does not apply to these links, which join all parts; leave it out")
    return section.read(LinkTier, name="joint")


def _parts(section: _Section, folders: Sequence[Path]) -> tuple[ClusterPart, ...]:
    """Returns the parts of a mixed cluster: each key names a cluster, of which `devices` are taken."""
    parts = []
    for name in section.values:
        inner = section.section(name)
        inner.check_keys(("devices",))
        devices = inner.whole("devices", "devices: 256")
        try:
            path = _path(str(name), folders)
            values = _document(path)
            if isinstance(values, Mapping) and "parts" in values:  # perhaps this very file
                raise RecipeError(f"cluster={name} is mixed itself; name its parts instead")
            parts.append(read_cluster(values, path.stem, str(path)).for_world(devices).parts[0])
        except RecipeError as error:
            raise RecipeError(f"{section.source}: {section.full(name)}: {error}") from error
    if len(parts) < 2 or len({len(part.tiers) for part in parts}) > 1:
        counts = {str(name): len(part.tiers) for name, part in zip(section.values, parts, strict=True)}
        raise RecipeError(f"{section.source}: parts must be two or more clusters with equally many tiers, not {counts}")
    return tuple(parts)
