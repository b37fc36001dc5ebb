"""Every field of the configuration has an effect: code outside config/ reads it."""

import ast
import dataclasses
from pathlib import Path

import megatron_evomoe
from megatron_evomoe.config import SECTIONS

PACKAGE = Path(megatron_evomoe.__file__).parent
# The field states the default, as in Megatron-LM, and is refused together with its opposite.
WITHOUT_EFFECT = {"override_opt_param_scheduler"}


def reads(tree: ast.AST) -> set[str]:
    """Names of the attributes that are read from objects other than `self`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


def read_outside() -> set[str]:
    files = [path for path in PACKAGE.rglob("*.py") if "config" not in path.relative_to(PACKAGE).parts]
    return set().union(*(reads(ast.parse(path.read_text(encoding="utf-8"))) for path in files))


def read_by_properties(names: set[str]) -> set[str]:
    """Fields that are read by those properties and methods of sections that `names` lists."""
    found: set[str] = set()
    for path in (PACKAGE / "config" / "model.py", PACKAGE / "config" / "training.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in names:
                found |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return found


def test_every_field_is_read_outside_of_the_configuration():
    outside = read_outside()
    read = outside | read_by_properties(outside)
    fields = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)}
    assert fields - read == WITHOUT_EFFECT
