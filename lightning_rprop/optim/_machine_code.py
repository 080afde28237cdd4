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
        name: What the function is called in the cache.
        source: What it is compiled from; when that changes, it is compiled again.
        compile_module: Compiles it, to the function's name and LLVM's text of a module that has it.

    Returns:
        The function's address.

    Raises:
        RuntimeError: If the compiled code does not have the function.
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
    if not address:  # a call would end the process
        raise RuntimeError(f"the compiled code has no function {name}")
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
    """Return where the code may be kept, best first.

    The folders' own name cannot be imported: in a script's folder it must not hide this package. Relative paths would
    be other folders in each process; the XDG specification ignores them too.
    """
    folders = [_absolute("NUMBA_CACHE_DIR")]
    with contextlib.suppress(RuntimeError):  # no home
        home = Path.home()
        if sys.platform == "win32":
            folders.append(_absolute("LOCALAPPDATA") or home / "AppData/Local")
        elif sys.platform == "darwin":
            folders.append(home / "Library/Caches")
        else:
            folders.append(_absolute("XDG_CACHE_HOME") or home / ".cache")
    return [folder / "lightning-rprop" for folder in folders if folder and folder.is_absolute()]


def _absolute(variable: str) -> Path | None:
    """Return the folder that an environment variable names by an absolute path."""
    folder = Path(os.environ.get(variable, ""))
    return folder if folder.is_absolute() else None


def _is_ours(status: os.stat_result) -> bool:
    """Return whether nobody else can have put machine code there; Windows keeps users' folders apart by itself."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _digest(file: Path, code: bytes) -> bytes:
    """Return a digest of the code and of what it is, so that no other kernel's file is taken for it."""
    return hashlib.sha256(file.name.encode() + b"\0" + code).digest()


def _read(file: Path) -> bytes | None:
    """Return the code, if the file is there, whole, and written by this user."""
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
    """Keep the code, all of it or nothing, and return whether that was possible."""
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
