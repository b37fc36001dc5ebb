"""Reference pages made from the code when the site is built, so that no flag or command is copied by hand.

A hook of mkdocs: `on_files` adds one page of configuration fields, one of commands, one of the Python API,
and the repository's own CHANGELOG, CONTRIBUTING and SECURITY with their links turned to the site.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt
from mkdocs.structure.files import File, Files

from megatron_evomoe import cli
from megatron_evomoe.config import SECTIONS, resume, text
from megatron_evomoe.config.flags import field_docs
from megatron_evomoe.config.run import STAGE_SECTIONS, flat_name

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
RESUME = {
    resume.OnResume.MUST_EQUAL: "must be equal",
    resume.OnResume.LOGGED: "may change, logged",
    resume.OnResume.FREE: "may change",
}
# What a program or an extension calls, and of a module that has more than that, the names.
API: dict[str, list[str]] = {
    "megatron_evomoe.config": ["load_config", "from_mapping", "RunConfig", "StageConfig", "StageKind"],
    "megatron_evomoe.train.loop": ["train"],
    "megatron_evomoe.train.hooks": ["StepHook"],
    "megatron_evomoe.train.stage_run": [],
    "megatron_evomoe.model.inventory": ["Tensor", "Counts", "tensors", "count", "part_of"],
    "megatron_evomoe.moe.router": [],
    "megatron_evomoe.moe.routers.base": ["TypedRouter"],
    "megatron_evomoe.moe.evolution_rules": [],
    "megatron_evomoe.hf": ["register"],
    "megatron_evomoe.generate.loading": [],
    "megatron_evomoe.evaluation.item": [],
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "reference/fields.md": fields_page(),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
    }
    pages |= {
        page: for_the_site((ROOT / name).read_text(encoding="utf-8")) for name, page in FROM_ROOT.items()
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's links to files of the repository's root, turned to their copies on the site."""
    for name, page in FROM_ROOT.items():
        markdown = re.sub(rf"(\]\((?:\.\./)*)\.\./{re.escape(name)}", rf"\1{page}", markdown)
    return markdown


def for_the_site(markdown: str) -> str:
    """A file of the repository's root with its relative links as they are between the site's pages."""
    for name, page in {**FROM_ROOT, "README.md": "index.md"}.items():
        markdown = markdown.replace(f"]({name}", f"]({page}")
    return markdown.replace("](docs/", "](")


def fields_page() -> str:
    """Every field of every section, with its flag, values, default and behaviour on resume."""
    lines = [
        "# Fields and flags",
        "",
        "This page is generated from the configuration's own classes (`megatron_evomoe/config/`). Each field"
        " can be set in the YAML file, under its section's name, or by its flag, which wins over the file."
        " [Reading a configuration](../configuration.md) tells how values are read and what is refused.",
        "",
        "*On resume* tells what happens when a run goes on from a checkpoint that was saved under another"
        " value: [what a resume compares](../checkpoints.md#what-a-resume-compares).",
    ]
    for section, cls in SECTIONS.items():
        doc = " ".join((cls.__doc__ or "").split())
        stage = (
            "A stage can override these fields."
            if section in STAGE_SECTIONS
            else "All stages share these fields."
        )
        lines += [
            "",
            f"## {section}",
            "",
            f"{doc} {stage}",
            "",
            "| flag | values | on resume | meaning |",
        ]
        lines += ["|---|---|---|---|"]
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            flat = flat_name(section, field.name)
            row = [
                f"`--{flat.replace('_', '-')}`{{ #{flat.replace('_', '-')} }}",
                f"{values(cls, field.name)}; default {default(field)}",
                RESUME[resume.on_resume(cls, field.name)],
                " ".join(docs.get(field.name, "").split()),
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def values(section: type, name: str) -> str:
    """The values that a field takes, in words, from its type."""
    return described(typing.get_type_hints(section, include_extras=True)[name])


def described(hint: Any) -> str:
    """A type in words: its kind, and the range that stands in its metadata."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = [limit for mark in arguments[1:] for limit in getattr(mark, "metadata", [])]
        return described(arguments[0]) + bounds(limits)
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in arguments)
    if origin is Literal:
        return ", ".join(f"`{text.dump(value).splitlines()[0]}`" for value in arguments)
    if origin in (list, tuple):
        item = described(arguments[0])
        return f"{'pair' if origin is tuple else 'list'} of {f'({item})' if ',' in item else item}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "none"}.get(
        hint, "any value"
    )


def bounds(limits: list[Any]) -> str:
    """A number's range, in words. The largest number of 32 bits, which bounds every counter, is left out."""
    found = {type(limit): limit for limit in limits}
    low, high = found.get(Ge), found.get(Le)
    if low and high and high.le != 2**31 - 1:
        return f", {plain(low.ge)} to {plain(high.le)}"
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    named = [(sign, getattr(found[kind], name)) for kind, (sign, name) in signs.items() if kind in found]
    return ",".join(f" {sign} {plain(value)}" for sign, value in named if value != 2**31 - 1)


def plain(value: float) -> str:
    """A number as a page shows it."""
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default, as the YAML file would write it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return "none" if value is None else f"`{text.dump(value).splitlines()[0]}`"


def commands_page() -> str:
    """Every command with its arguments, from the parsers themselves."""
    lines = [
        "# Commands",
        "",
        "This page is generated from the parsers of the commands. A command is called as"
        " `python -m megatron_evomoe COMMAND`, or `megatron-evomoe COMMAND` where the package is installed,"
        " and `--help` prints the same list.",
    ]
    for command in cli.COMMANDS:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
        own = [a for a in actions if not a.dest.startswith("cfg_") or a.dest == "cfg_preset"]
        lines += ["", f"## {command.name}", "", sentence(command.help)]
        if own:
            lines += ["", "| argument | default | meaning |", "|---|---|---|"]
            lines += [argument_row(a) for a in own]
        else:
            lines += ["", "It takes no arguments."]
        if len(own) < len(actions):
            lines += ["", "Each [field of the configuration](fields.md) is a flag of this command too."]
    return "\n".join(lines) + "\n"


def sentence(words: str) -> str:
    """`words` with a capital and a full stop."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


def argument_row(action: argparse.Action) -> str:
    """One argument as a row of a table."""
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
    if action.choices:
        flags += " " + ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.option_strings and action.nargs != 0:
        flags += f" *{action.metavar or action.dest.removeprefix('cfg_').upper()}*"
    given = not any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
    value = "required" if action.required else f"`{action.default}`" if given else ""
    words = re.sub(r"\s*\(default:? %\(default\)s\)", "", action.help or "")  # it has a column of its own
    words = words % {"default": action.default}
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (flags, value, words)) + " |"


def api_page() -> str:
    """Directives from which mkdocstrings makes the reference of the Python API."""
    lines = ["# Python API", "", "Programs and extensions call these names, or register with them."]
    for module, members in API.items():
        lines += ["", f"::: {module}"]
        if members:
            lines += ["    options:", f"      members: [{', '.join(members)}]"]
    return "\n".join(lines) + "\n"
