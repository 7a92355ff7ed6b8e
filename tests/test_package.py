"""What is built, what it declares, and what importing it loads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "sla2_compile",
    "sla2_compile/exporters",
    "sla2_compile/passes",
    "sla2_compile/kernels",
    "sla2_compile/quant",
)
DATA_SUFFIXES = (".html.jinja",)


def expected_files() -> set[str]:
    """Every source, template and marker file of the four packages, as paths from the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).iterdir()
        if path.suffix == ".py" or path.name == "py.typed" or path.name.endswith(DATA_SUFFIXES)
    }


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that runs ``code`` with the root first on its path."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    # A build writes beside the sources, and setuptools trusts an old list of files that it finds there.
    checkout = tmp_path_factory.mktemp("copy") / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_wheel_holds_the_five_packages_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected_files()


def test_the_wheel_declares_the_backend_and_the_command(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(entry_points).decode()
    assert "[torch_dynamo_backends]\nsla2 = sla2_compile.backend:sla2" in text
    assert "[console_scripts]\nsla2 = sla2_compile.cli:main" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_sdist_holds_the_packages_and_the_project_files_and_nothing_else(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        paths = {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}
    generated = {path for path in paths if path.startswith("sla2_compile.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    project = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "constraints.txt", "pyproject.toml"}
    assert paths - generated == expected_files() | project


def test_importing_the_package_loads_no_optional_dependency() -> None:
    # torch imports triton by itself where it is installed, so what counts is what comes after it.
    code = (
        "import sys, torch; before = set(sys.modules); import sla2_compile; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = set(run_python(code).split())
    assert "sla2_compile" in loaded
    assert not loaded & {"triton", "torchao", "diffusers", "transformers", "matplotlib", "onnx", "sklearn"}


def test_the_name_in_quant_loads_torchao_only_when_it_is_used() -> None:
    code = "import sys, sla2_compile.quant as q; print('torchao' in sys.modules, callable(q.SLA2QATConfig))"
    pytest.importorskip("torchao")
    assert run_python(code).splitlines()[-1] == "False True"


def test_a_name_that_quant_does_not_have_is_an_attribute_error() -> None:
    assert run_python("import sla2_compile.quant as q; print(hasattr(q, 'QATConfig'))") == "False"


def test_without_torchao_its_name_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torchao'] = None\nimport sla2_compile.quant as q\n"
        "try: q.SLA2QATConfig\nexcept ImportError as error: print(error)"
    )
    assert run_python(code) == "SLA2QATConfig: expected torchao; pip install 'sla2-compile[quant]'"


def test_importing_quant_through_the_symlink_is_an_error_that_names_the_right_import() -> None:
    # It has an __init__.py, so a checkout on the path does hide another package of this name.
    code = "try: import quant\nexcept ImportError as error: print(error)"
    assert run_python(code).startswith("expected the import of sla2_compile.quant, got 'quant'")


def test_only_quant_has_an_init_file_because_no_other_package_we_meet_has_its_name() -> None:
    assert [name for name in ("passes", "kernels", "quant") if (ROOT / name / "__init__.py").exists()] == ["quant"]
    # Nothing that is installed beside us brings, or could be looking for, a package called quant.
    code = "import sys; sys.path.remove(''); import importlib.util as u; print(u.find_spec('quant'))"
    assert run_python(code) == "None"


def test_the_symlink_at_the_root_does_not_pass_for_the_package_named_kernels() -> None:
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec is None or spec.origin)"
    # None: a folder without __init__.py, which any real package of that name outranks.
    origin = run_python(code)
    assert origin in ("True", "None") or not Path(origin).resolve().is_relative_to(ROOT)


def test_a_real_package_named_kernels_is_found_before_the_symlink(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__file__)"
    assert Path(run_python(code)).is_relative_to(tmp_path)
