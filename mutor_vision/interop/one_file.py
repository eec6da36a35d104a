"""Definitions of this package, with everything of ours that they use, as one file that needs no `mutor_vision`.

Made from the sources themselves, so that there is no second implementation: what is exported is what was tested."""

import ast
import importlib
import importlib.util
import inspect

PACKAGE = __package__.partition(".")[0]


def one_file(module: str, names: list[str], docstring: str) -> str:
    """Source of a file that defines `names` of `module`. Raises AssertionError where two of the modules that are needed
    mean different things by one name, which nothing but a change of this package can cause."""
    gathered = _Gathered()
    for name in names:
        gathered.take(module, name)
    imports = "\n".join(sorted(gathered.imports))
    return f'"""{docstring}"""\n\n{imports}\n\n\n' + "\n\n\n".join(gathered.sources) + "\n"


class _Module:
    """What a module's top level binds: name -> its statement, or (module, name) of ours, or an import of others."""

    def __init__(self, name: str):
        self.source = inspect.getsource(importlib.import_module(name))
        self.lines = self.source.splitlines()
        self.bound: dict[str, ast.stmt | tuple[str, str] | str] = {}
        for statement in ast.parse(self.source).body:
            self._bind(statement)

    def _bind(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            module = (statement.module or "") if isinstance(statement, ast.ImportFrom) else ""
            ours = module.split(".")[0] == PACKAGE
            for alias in statement.names:
                name = alias.asname or alias.name.split(".")[0]
                line = ast.unparse(type(statement)(**{**vars(statement), "names": [alias]}))
                self.bound[name] = (module, alias.name) if ours else line
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            self.bound[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for name in (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)):
                self.bound[name] = statement

    def text(self, statement: ast.stmt) -> str:
        """Its source, with decorators and the comments right above."""
        first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : statement.end_lineno])


class _Gathered:
    """Definitions in an order in which each comes after those that it uses."""

    def __init__(self):
        self.imports: set[str] = set()
        self.sources: list[str] = []
        self._modules: dict[str, _Module] = {}
        self._taken: dict[str, tuple[str, int]] = {}  # name -> the module and the line that define it

    def take(self, module: str, name: str) -> None:
        known = self._modules.setdefault(module, _Module(module))
        bound = known.bound[name]
        if isinstance(bound, tuple):
            self.take(*bound)
            return
        if isinstance(bound, str):
            assert self._taken.setdefault(name, (bound, 0)) == (bound, 0), f"{name} has two meanings"
            self.imports.add(bound)
            return
        place = module, bound.lineno
        before = self._taken.setdefault(name, place)
        assert before == place, f"{name} has two meanings, in {before[0]} and {module}"
        text = known.text(bound)
        if before is not place or text in self.sources:
            return
        for node in ast.walk(bound):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                raise AssertionError(f"{name} of {module} imports {node.module} inside; it cannot be exported")
            if not isinstance(node, ast.Name) or node.id not in known.bound or node.id == name:
                continue
            used = known.bound[node.id]
            if isinstance(used, tuple) and _is_module(".".join(used)):
                text = text.replace(f"{node.id}.", "")  # fast_paths.pack: in one file it is pack
            else:
                self.take(module, node.id)
        for node in ast.walk(bound):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = known.bound.get(node.value.id)
                if isinstance(owner, tuple) and _is_module(".".join(owner)):
                    self.take(".".join(owner), node.attr)
        self.sources.append(text)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and no package
        return False
