"""A cache of machine code on disk, which LLVM loads without Numba.

Reading Numba's own cache requires ``import numba``, which takes 0.25 to 0.5 s in each process. Loading object code with
LLVM takes 0.05 s.
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
_engines: list[Any] = []  # keeps the loaded code alive


def load(name: str, source: str, compile_module: Callable[[], tuple[str, str]], check: Callable[[int], object]) -> int:
    """Load a function from the cache, or compile it.

    Args:
        name: Name of the function in the cache.
        source: Source code of the function, part of the cache key.
        compile_module: Compiles the function and returns its symbol and the LLVM IR of its module.
        check: Called with the address of a function that was compiled, not loaded. If it raises, the function is not
            written to the cache.

    Returns:
        The address of the function.

    Raises:
        RuntimeError: If the compiled code lacks the function.
        Exception: Whatever ``compile_module`` or ``check`` raises.
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
    key_parts = (source, version("numba"), version("llvmlite"), target.triple, cpu, features)
    key = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()
    files = [folder / f"{name}-{key[:32]}.o" for folder in _folders()]
    cached = next((code for file in files if (code := _read(file))), None)
    code = cached or _emit(name, *compile_module(), target)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    if not address:  # calling address 0 would crash the process
        raise RuntimeError(f"The compiled code has no function {name}.")
    if not cached:
        check(address)
        any(_write(file, code) for file in files)  # stops at the first folder that can be written to
    return address


def _emit(name: str, compiled_name: str, module_text: str, target: Any) -> bytes:
    """Compile a module to object code with one function that does not depend on Numba's runtime."""
    module = llvm.parse_assembly(module_text.replace(compiled_name, name))
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.linkage = "internal"  # so that it is inlined, which removes unused exception handling
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(module, passes)
    needed = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if needed:  # LLVM would crash the process if it could not find them
        raise RuntimeError(f"The code of {name} needs {', '.join(needed)}, which only Numba provides.")
    code: bytes = target.emit_object(module)
    return code


def _folders() -> list[Path]:
    """Return the folders for the cache in order of preference.

    Their name is not importable, so that a cache next to a script cannot hide this package. Relative paths are ignored,
    as in the XDG specification, because they depend on the working directory.
    """
    folders = [_absolute("NUMBA_CACHE_DIR")]
    with contextlib.suppress(RuntimeError):  # no home directory
        home = Path.home()
        if sys.platform == "win32":
            folders.append(_absolute("LOCALAPPDATA") or home / "AppData/Local")
        elif sys.platform == "darwin":
            folders.append(home / "Library/Caches")
        else:
            folders.append(_absolute("XDG_CACHE_HOME") or home / ".cache")
    return [folder / "lightning-rprop" for folder in folders if folder and folder.is_absolute()]


def _absolute(variable: str) -> Path | None:
    """Return the folder in an environment variable if its path is absolute."""
    folder = Path(os.environ.get(variable, ""))
    return folder if folder.is_absolute() else None


def _is_ours(status: os.stat_result) -> bool:
    """Return whether only this user can write there; on Windows the folders are private by default."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _digest(file: Path, code: bytes) -> bytes:
    """Return a digest of the file's name and code, so that a renamed file of another kernel is not loaded."""
    return hashlib.sha256(file.name.encode() + b"\0" + code).digest()


def _read(file: Path) -> bytes | None:
    """Return the code if the file exists, is intact, and only this user could write it."""
    try:
        if not _is_ours(file.parent.stat()):
            return None
        with file.open("rb") as stream:
            if not _is_ours(os.fstat(stream.fileno())):
                return None
            data = stream.read()
    except OSError:
        return None
    digest, code = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    return code if _digest(file, code) == digest else None


def _write(file: Path, code: bytes) -> bool:
    """Write the code atomically, and return whether that succeeded."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(file.parent.stat()):
            return False
        handle, temporary = tempfile.mkstemp(dir=file.parent)
    except OSError:
        return False
    try:
        with open(handle, "wb") as stream:
            stream.write(_digest(file, code) + code)
        os.replace(temporary, file)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return True
