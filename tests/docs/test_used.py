"""Nothing that the docs name, and no function of the package, is there for the tests alone."""

import ast
import re
from collections import Counter

from tests.docs.blocks import ROOT, pages

PROGRAMS = ("icet_jax", "scripts", "benchmarks", "configs", "launch", "examples")
CALLED_BY_LIBRARIES = {
    "do_POST", "log_message",  # http.server
    "http_open", "https_open", "redirect_request",  # urllib
    "should_preserve",  # orbax
}  # fmt: skip


def uses(sources):
    """How often each name is read, as a name, as an attribute or as the end of a dotted path of the Python surface."""
    found = Counter()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name | ast.Attribute):
                found[node.id if isinstance(node, ast.Name) else node.attr] += 1
            elif isinstance(node, ast.Constant) and re.fullmatch(r"(\w+\.)+\w+", str(node.value)):
                found[str(node.value).rpartition(".")[2]] += 1
    return found


def named(text):
    """The names that the spans of a page end with: `icet_jax.nn.heads.value` gives "value"."""
    return {match.rpartition(".")[2] for match in re.findall(r"`icet_jax((?:\.\w+)+)", text)}


def functions(source):
    """Names of the functions and methods that a file defines; not those that Python itself calls."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {node.name for node in nodes if not node.name.startswith("__")}


def files(*folders):
    """Every Python file of some folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def in_templates():
    """The attributes that the expressions of the report's templates read."""
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "icet_jax/report/templates").iterdir())]
    expressions = re.findall(r"\{[{%](.*?)[%}]\}", "".join(texts), re.S)
    return {name for expression in expressions for name in re.findall(r"\.(\w+)", expression)}


def modules():
    """Names of the package's files and folders, which docs name too."""
    return {part for path in files("icet_jax") for part in path.relative_to(ROOT).with_suffix("").parts}


def test_no_page_names_what_nothing_uses():
    used = uses(path.read_text("utf-8") for path in files(*PROGRAMS))
    present = [page for page in pages() if page.name != "CHANGELOG.md"]  # which names what was
    unused = {page.name: named(page.read_text("utf-8")) - set(used) - modules() for page in present}
    assert {page: names for page, names in unused.items() if names} == {}


def test_every_function_is_called():
    used = uses(path.read_text("utf-8") for path in files(*PROGRAMS))
    defined = {name: path for path in files("icet_jax") for name in functions(path.read_text("utf-8"))}
    unused = {
        name: str(path.relative_to(ROOT))
        for name, path in defined.items()
        if not used[name] and name not in in_templates()
    }
    assert unused.keys() - CALLED_BY_LIBRARIES == set(), unused
    assert unused.keys() >= CALLED_BY_LIBRARIES


def test_a_name_that_is_only_defined_is_unused():
    source = "SURFACE = {'a': 'runs.a'}\ndef a(): pass\ndef b(): pass\ndef c(): b\nclass D:\n    def e(self): self.c\n"
    assert functions(source) - set(uses([source])) == {"e"}
    assert named("see `icet_jax.nn.heads.value` and `icet_jax.load(...)`, not icet_jax.x or `config.y`") == {
        "value",
        "load",
    }
