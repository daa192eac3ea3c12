"""The house's rules, read from the source: which way imports run, and that a thing has the same name everywhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gptfast
from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops.spec import Op

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "cpu"

# From the ground up. A part imports parts of lower rows, and itself; within a row only what BESIDE names.
LAYERS = (
    ("hardware", "formats", "kernels"),
    ("quantize",),
    ("ops",),
    ("layers",),
    ("model", "patch", "compat"),
    ("generate",),
    ("train", "serve", "bench", "profile", "demo"),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
# A kernel's storage may be a quantised weight, whose class knows its own kernels for packing. The demo is a benchmark,
# and trains a model. What a patched Hugging Face model calls is compat's.
BESIDE = {("kernels", "quantize"), ("demo", "bench"), ("demo", "train"), ("patch", "compat")}
# Parts on the ground know nothing above them, and less than their row would allow.
NEVER = {
    "hardware": set(RANK) - {"hardware"},
    "formats": set(RANK) - {"formats"},
    "patch": {"formats", "hardware"},
    "compat": {"formats", "hardware"},
}


def part(module: str) -> str:
    """gptfast.ops.spec -> ops; gptfast itself -> ""."""
    return module.split(".")[1] if "." in module else ""


def sources() -> list[tuple[str, Path]]:
    """Every module of the package with its file, the kernels' among them."""
    files = [("", path) for path in sorted((ROOT / "gptfast").rglob("*.py"))]
    files += [("gptfast.", path) for path in sorted((ROOT / "kernels").rglob("*.py"))]
    return [
        (prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path)
        for prefix, path in files
    ]


class Imports(ast.NodeVisitor):
    """The gptfast modules that a file imports: at once, and later (inside functions). What only type checkers read
    (under TYPE_CHECKING) doesn't count: it never runs."""

    def __init__(self) -> None:
        self.at_once: set[str] = set()
        self.later: set[str] = set()
        self.others: set[str] = set()  # top-level names of other packages that are imported at once
        self._depth = 0

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        module = node.module or ""
        for alias in node.names:
            self._add(f"{module}.{alias.name}" if module == "gptfast" else module)

    def _add(self, module: str) -> None:
        if module.split(".")[0] == "gptfast":
            (self.later if self._depth else self.at_once).add(module)
        elif not self._depth:
            self.others.add(module.split(".")[0])


def imports(path: Path) -> Imports:
    found = Imports()
    found.visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_the_arrows(module: str, path: Path) -> None:
    mine = part(module)
    if mine in ("", "__main__"):
        return  # the front door: the next test
    assert mine in RANK, f"{module}: LAYERS doesn't say where it stands"
    found = imports(path)
    for other in sorted(found.at_once | found.later):
        theirs = part(other)
        if theirs == mine or theirs == "_cpu" or theirs not in RANK:
            continue  # its own, the extension, or a name that gptfast/__init__.py defines
        below = RANK[theirs] < RANK[mine] or (mine, theirs) in BESIDE
        assert below and theirs not in NEVER.get(mine, set()), f"{module} imports {other}: the arrow runs the other way"


def test_the_front_door_is_light() -> None:
    found = imports(ROOT / "gptfast" / "__init__.py")
    assert {part(m) for m in found.at_once} <= {"ops"}, "what needs more than the ops is imported when it is asked for"


LIGHT = ("hardware", "kernels", "quantize", "ops", "layers", "")  # what `import gptfast` may reach


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_other_packages(module: str, path: Path) -> None:
    """Below the model torch is enough; nobody imports a test's or a benchmark's packages."""
    others = imports(path).others - set(stdlib()) - {"torch"}
    if module.startswith("gptfast.kernels.triton"):
        others -= {"triton"}  # which nothing else imports before a kernel is asked for
    if part(module) in LIGHT:
        assert not others, f"{module} imports {others}"
    assert not others & {"pytest", "hypothesis", "transformers", "gguf", "benchmarks", "tests"}, f"{module}: {others}"


def stdlib() -> frozenset[str]:
    import sys

    return frozenset(sys.stdlib_module_names)


def test_only_the_extension_is_native() -> None:
    """Kernels are called by their backend alone: nothing above it passes pointers."""
    users = {part(m) for m, path in sources() if "gptfast._cpu" in (i := imports(path)).at_once | i.later}
    assert users <= {"kernels", "hardware"}


# --- names


def kernel_names() -> dict[str, str]:
    """Each kernel in the table of kernels.h, with its arguments' struct."""
    text = (KERNELS / "kernels.h").read_text()
    table = re.search(r"#define GPTFAST_KERNELS\(KERNEL\)(.*?[^\\])\n", text, re.DOTALL)
    assert table is not None
    return dict(re.findall(r"KERNEL\((\w+),\s*(\w+)\)", table[1]))


def test_a_kernel_has_its_page_and_its_source() -> None:
    for path in KERNELS.glob("*.py"):
        if path.name == "__init__.py":
            continue
        assert path.with_suffix(".cpp").exists(), f"{path.name} has no {path.stem}.cpp beside it"
        page = ROOT / "gptfast" / "ops" / path.name
        assert page.exists() or path.stem == "quantize", f"{path.name} has no page gptfast/ops/{path.name}"


def test_every_kernel_is_bound_and_typed() -> None:
    kernels = kernel_names()
    assert len(kernels) >= 5
    bound = dict(re.findall(r"^\s*BIND\((\w+), (\w+),", (KERNELS / "bindings.cpp").read_text(), re.MULTILINE))
    assert bound == kernels, "kernels.h and bindings.cpp name other kernels or structs"
    typed = set(re.findall(r"^def (\w+)\(threads", (ROOT / "gptfast" / "_cpu.pyi").read_text(), re.MULTILINE))
    assert typed == set(kernels), "gptfast/_cpu.pyi names other kernels"


def test_every_field_is_bound() -> None:
    """A field of an arguments struct that its BIND line forgets would be zero in every call."""
    header = re.sub(r"//.*", "", (KERNELS / "kernels.h").read_text())
    bindings = (KERNELS / "bindings.cpp").read_text()
    for kernel, struct in kernel_names().items():
        body = re.search(rf"struct {struct} {{(.*?)\n}};", header, re.DOTALL)
        line = re.search(rf"BIND\({kernel}, {struct},(.*?)\);", bindings, re.DOTALL)
        assert body is not None and line is not None
        lines = [x for x in body[1].split(";") if not x.strip().startswith("enum")]
        fields = {
            re.sub(r"\[.*?\]", "", name).split()[-1].lstrip("*") for x in lines if x.strip() for name in x.split(",")
        }
        bound = {name.strip() for name in line[1].split(",")}
        assert bound <= fields, f"{kernel}: {bound - fields} are no fields of {struct}"
        forgotten = fields - bound
        shared = [k for k, s in kernel_names().items() if s == struct and k != kernel]
        assert not forgotten or shared, f"{kernel}: {forgotten} are never set"


def test_there_is_no_top_level_package_kernels() -> None:
    """It would shadow Hugging Face's library of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


HOST = {"bindings.cpp", "dispatch.cpp", "memory.cpp", "openmp.cpp", "parallel.cpp"}
KERNEL_SOURCES = [p for p in sorted(KERNELS.glob("*.cpp")) if p.name not in HOST]


@pytest.mark.parametrize("path", [*KERNEL_SOURCES, KERNELS / "vec.h"], ids=lambda p: p.name)
def test_kernel_sources_are_safe_for_every_instruction_set(path: Path) -> None:
    """No std:: (an inline function shared by two instruction sets is merged by the linker), no PyTorch, intrinsics only
    where the machine is known to have them."""
    code = re.sub(r'//.*|"(?:[^"\\]|\\.)*"', "", path.read_text())
    assert not re.search(r"\bstd::", code)
    assert not re.search(r"\b(torch|ATen|c10|at)::|<torch/|<ATen/|<pybind11/", path.read_text())
    allowed = {"cstddef", "cstdint", "cstring"}
    assert set(re.findall(r"#include <(.+?)>", path.read_text())) <= allowed | {"immintrin.h", "arm_neon.h"}
    guards: list[bool] = []
    for number, text in enumerate(code.splitlines(), 1):
        line = text.strip()
        if re.match(r"#\s*if", line):
            guards.append(bool(re.search(r"__AVX|__SSE|__x86_64__|__FMA__|__aarch64__|VEC_BYTES", line)))
        elif re.match(r"#\s*el", line):
            guards[-1] = True
        elif re.match(r"#\s*endif", line):
            guards.pop()
        elif re.search(r"\b_mm\d*_\w+\(|\b__m(128|256|512)i?\b|\bv\w+q?_f32\(", line):
            assert any(guards), f"{path.name}:{number} uses an intrinsic outside #if"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.h")), ids=lambda p: p.name)
def test_headers_know_no_framework(path: Path) -> None:
    assert not re.search(r"<(torch|ATen|c10|pybind11)/", path.read_text())


# --- pages


@pytest.mark.parametrize("op", ops.pages().values(), ids=lambda op: op.name)
def test_a_page_has_all_its_parts(op: Op) -> None:
    page = inspect.getmodule(op.function)
    assert page is not None and page.__name__.startswith("gptfast.ops.")
    doc = page.__doc__ or ""
    assert len(doc.splitlines()) >= 8, (
        "the page begins with the formula, the arguments' shapes and dtypes, the edge rules"
    )
    assert getattr(ops, op.name) is op.function and op.name in ops.__all__
    cases = op.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    assert any("bench" in case.tags for case in cases) and any("bench" not in case.tags for case in cases)
    assert {tag for case in cases for tag in case.tags} <= {"bench", "big"}
    public = inspect.signature(op.function).parameters
    reference = inspect.signature(op.reference).parameters
    assert "backend" in public and "backend" not in reference
    for case in cases[:1]:
        arguments = case.arguments(op.dtypes[0])
        assert set(arguments) <= set(public)
        cost = op.cost(**arguments)
        assert cost.bytes >= 0 and cost.flops >= 0 and cost.unit in ("fp32", "int8")


@pytest.mark.parametrize("op", ops.pages().values(), ids=lambda op: op.name)
def test_the_reference_takes_what_the_public_function_takes(op: Op) -> None:
    public, reference = (inspect.signature(f).parameters for f in (op.function, op.reference))
    mine = {name: p.default for name, p in public.items() if name != "backend"}
    theirs = {name: p.default for name, p in reference.items() if p.kind is not p.VAR_KEYWORD}
    assert theirs.items() <= mine.items(), "other names or defaults"
    if len(theirs) == len(reference):
        assert list(mine) == list(theirs)


# --- what the public sees


def public_modules() -> list[ModuleType]:
    names = ["gptfast", "gptfast.ops", "gptfast.ops.spec", "gptfast.hardware", "gptfast.bench", "gptfast.quantize"]
    return [importlib.import_module(name) for name in names]


def public_functions() -> Iterator[tuple[str, object]]:
    for module in public_modules():
        names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
        for name in names:
            thing = getattr(module, name)
            if getattr(thing, "__module__", "").split(".")[0] == "gptfast" and callable(thing):
                yield f"{module.__name__}.{name}", thing


@pytest.mark.parametrize(("name", "thing"), list(public_functions()), ids=lambda x: x if isinstance(x, str) else "")
def test_the_public_is_documented_and_typed(name: str, thing: object) -> None:
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert not bare, f"{name}: no hints for {', '.join(bare)}"
        assert signature.return_annotation is not signature.empty, f"{name}: no hint for what it returns"


def test_names_promised_are_there() -> None:
    for name in gptfast.__all__:
        assert getattr(gptfast, name) is not None


@pytest.mark.parametrize("path", sorted(p for _, p in sources()), ids=lambda p: p.name)
def test_files_can_be_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_the_kernels_readme_is_up_to_date() -> None:
    from benchmarks import coverage

    if (reason := reason_missing("cpu")) is not None:
        pytest.skip(reason)
    written = coverage.README.read_text()
    assert coverage.updated(written) == written, "run: python -m benchmarks.coverage"
