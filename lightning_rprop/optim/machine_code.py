"""Machine code that is compiled once on a machine, kept on disk, and loaded without the compiler.

Numba's own cache does not serve: reading it takes ``import numba``, 0.25 to 0.5 s in each process. Here the object code
is kept, which LLVM loads alone, in a twentieth of a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

_DIGEST_SIZE = hashlib.sha256().digest_size
_engines: list[Any] = []  # they own the loaded code


def load(name: str, source: str, compile_module: Callable[[], tuple[str, str]]) -> int:
    """Load a function, from disk if it was compiled on such a machine before.

    Args:
        name: what the function is called in the cache.
        source: what it is compiled from; when that changes, it is compiled anew.
        compile_module: compiles it, to the function's name and LLVM's text of a module that has it.

    Returns:
        The function's address.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=cpu,
        features=features,
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )
    made_by = (source, version("numba"), version("llvmlite"), target.triple, cpu, features)
    key = hashlib.sha256("\0".join(made_by).encode()).hexdigest()
    files = [folder / f"{name}-{key[:32]}.o" for folder in _folders()]
    code = next((code for file in files if (code := _read(file))), None)
    if code is None:
        code = _emit(name, *compile_module(), target)
        any(_write(file, code) for file in files)  # the first where that is possible
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address


def _emit(name: str, compiled_name: str, module_text: str, target: Any) -> bytes:
    """Turn a module into object code with one function, which needs nothing of Numba's."""
    module = llvm.parse_assembly(module_text.replace(compiled_name, name))
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.linkage = "internal"  # inlined, and with it goes the handling of exceptions that it never raises
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(module, passes)
    needed = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if needed:  # LLVM would end the process when it cannot find them
        raise RuntimeError(f"the code of {name} needs {', '.join(needed)}, which only Numba has")
    code: bytes = target.emit_object(module)
    return code


def _folders() -> list[Path]:
    """Where the code may be kept, best first."""
    folders = []
    if "NUMBA_CACHE_DIR" in os.environ:
        folders.append(Path(os.environ["NUMBA_CACHE_DIR"]))
    with contextlib.suppress(RuntimeError):  # no home
        home = Path.home()
        if sys.platform == "win32":
            user = os.environ.get("LOCALAPPDATA") or home / "AppData/Local"
        elif sys.platform == "darwin":
            user = home / "Library/Caches"
        else:
            user = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
        folders.append(Path(user))
    return [folder / "lightning_rprop" for folder in folders]


def _read(file: Path) -> bytes | None:
    """Give the code, if the file is there and whole."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(file: Path, code: bytes) -> bool:
    """Keep the code, all of it or nothing, and tell whether that was possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
    except OSError:
        return False
    try:
        with open(handle, "wb") as stream:
            stream.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, file)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return True
