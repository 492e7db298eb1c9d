"""Reads recipe files so that text stays as written: plain YAML 1.1 reads `name: 2024_01` as a number and `name: yes` as true.

Which scalars are text depends on their keys, so the reader must know which section of the recipe a file fills.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TextIO

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import OmegaConfDumper, get_omega_conf_dumper, get_yaml_loader

from bagualu.comm.errors import RecipeError
from bagualu.trainer.recipe.keys import kind_of
from bagualu.trainer.recipe.override_text import ValueKind

_TEXT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
_CHOICES = "defaults"
"""The key of a recipe file that names other files; these names are text too."""


def read_yaml(stream: TextIO, section: str = "") -> Any:
    """Returns the YAML document in `stream`, whose keys are those of `section` ("" for a whole recipe), as plain values; None if it
    is empty. Raises YAMLError."""
    loader = get_yaml_loader()(stream)
    try:
        root = loader.get_single_node()
        return None if root is None else loader.construct_document(_as_text(root, section))
    finally:
        loader.dispose()


def write_yaml(values: Any) -> str:
    """Returns plain values as YAML from which `read_yaml`, and any YAML 1.1 reader, reads the same text."""
    written: str = yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return written


class _Dumper(get_omega_conf_dumper()):  # type: ignore[misc]
    """OmegaConf's dumper, but with non-ASCII line ends escaped: PyYAML writes these unescaped and reads them back as a space."""


def _represented(dumper: Any, text: str) -> yaml.Node:
    outside_ascii = any(end in text for end in "\x85\u2028\u2029")
    node: yaml.Node = (
        dumper.represent_scalar(_TEXT, text, style='"') if outside_ascii else OmegaConfDumper.str_representer(dumper, text)
    )
    return node


_Dumper.add_representer(str, _represented)


def keep_text_in_recipe_files() -> None:
    """Makes Hydra read recipe files with `read_yaml` from now on."""
    Plugins.instance()  # registers Hydra's own sources
    SourcesRegistry.instance().types.update({source.scheme(): source for source in (_Folder, _Package)})


class _Folder(FileConfigSource):  # type: ignore[misc]
    """Recipe files below a folder."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        return _result(*_read(super().load_config, config_path, str(path), lambda: path.open(encoding="utf-8")))


class _Package(ImportlibResourcesConfigSource):  # type: ignore[misc]
    """Recipe files in a Python package. Each is read once: it stays as it is while a process lives."""

    _known: ClassVar[dict[str, tuple[ConfigResult, Any]]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        path = files(self.path).joinpath(self._normalize_file_name(config_path))
        if str(path) not in self._known:
            self._known[str(path)] = _read(super().load_config, config_path, str(path), lambda: path.open(encoding="utf-8"))
        return _result(*self._known[str(path)])


def _result(result: ConfigResult, content: Any) -> ConfigResult:
    """Returns a copy of `result` that holds `content`."""
    return replace(result, header=dict(result.header), config=OmegaConf.create({} if content is None else content))


def _read(
    load: Callable[[str], ConfigResult], config_path: str, name: str, open_file: Callable[[], Any]
) -> tuple[ConfigResult, Any]:
    """Returns the result of `load`, and what the file holds, with text as written. Raises RecipeError, YAMLError."""
    try:
        result = load(config_path)
        with open_file() as stream:
            if stream.read(1) == "\ufeff":
                raise RecipeError(f"{name} begins with a byte order mark, which hides its first line; save it without")
            stream.seek(0)
            content = read_yaml(stream, _section(result, config_path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text (byte {error.start}); convert it") from error
    except RecursionError as error:
        raise RecipeError(f"{name} has an alias that stands for itself; write the value out") from error
    return result, content


def _section(result: ConfigResult, config_path: str) -> str:
    """Returns the section that a recipe file fills (its package in Hydra's terms), by default the group that contains it."""
    group, _, name = config_path.removesuffix(".yaml").replace("/", ".").rpartition(".")
    package = result.header.get("package") or "_group_"
    return package.replace("_global_", "").replace("_group_", group).replace("_name_", name).strip(".")


def _as_text(node: yaml.Node, key: str) -> yaml.Node:
    """Returns a copy of `node`, the value of `key`, with text marked as text. It is a copy because keys of other kinds may share an
    anchor."""
    if isinstance(node, yaml.MappingNode):
        entries = [(name, _as_text(value, _inside(key, name))) for name, value in node.value]
        return yaml.MappingNode(node.tag, entries, node.start_mark, node.end_mark, node.flow_style)
    if isinstance(node, yaml.SequenceNode):
        items = [_as_text(item, key) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    return yaml.ScalarNode(_tag(node, key), node.value, node.start_mark, node.end_mark)


def _inside(key: str, name: yaml.Node) -> str:
    if name.tag == _MERGE:
        return key
    return f"{key}.{name.value}" if key else str(name.value)


def _tag(node: yaml.Node, key: str) -> str:
    in_choices = _CHOICES in key.split(".")
    kind = ValueKind.OPTIONAL_TEXT if in_choices else kind_of(key)
    if kind is ValueKind.OTHER or (node.tag == _NULL and (kind is ValueKind.OPTIONAL_TEXT or not node.value)):
        return str(node.tag)
    return _TEXT
