"""What a module offers, as pages of documentation show it: signatures, docstrings and the comments of parameters.

Read from the exported cells of a notebook without importing anything.
"""

import ast
import io
import tokenize


def comments_of(source: str) -> dict[int, str]:
    "Line -> its comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def docments(node: ast.FunctionDef, comments: dict[int, str]) -> tuple[list[tuple[str, str]], str]:
    "Names of parameters with what their comment says, those of one line together; and what is returned."
    spec = node.args
    given = [
        *spec.posonlyargs,
        *spec.args,
        *([spec.vararg] if spec.vararg else []),
        *spec.kwonlyargs,
        *([spec.kwarg] if spec.kwarg else []),
    ]
    lines: dict[int, list[str]] = {}
    for argument in given:
        lines.setdefault(argument.end_lineno, []).append(argument.arg)
    body = node.body[0].lineno
    # a default may end a line later than the name: the comment is on the line where the next parameter has not begun
    ends = dict.fromkeys(lines)
    starts = sorted(lines)
    for number, line in enumerate(starts):
        until = starts[number + 1] if number + 1 < len(starts) else node.returns.end_lineno if node.returns else body
        ends[line] = next((comments[row] for row in range(line, max(until, line + 1)) if row in comments), "")
    said = [(", ".join(f"`{name}`" for name in lines[line]), ends[line]) for line in starts if ends[line]]
    if node.returns and node.returns.end_lineno in lines and len(lines) == 1 and said:
        return [], said[0][1]  # all on one line: the comment is of what is returned
    return said, comments.get(node.returns.end_lineno, "") if node.returns else ""


def signature(node: ast.FunctionDef, method: bool = False) -> str:
    "The signature on one line."
    spec = node.args
    if method and not any(getattr(mark, "id", "") == "staticmethod" for mark in node.decorator_list):
        first = (spec.posonlyargs or spec.args)[:1]
        spec = ast.arguments(
            spec.posonlyargs[1:] if spec.posonlyargs else [],
            spec.args if spec.posonlyargs else spec.args[len(first) :],
            spec.vararg,
            spec.kwonlyargs,
            spec.kw_defaults,
            spec.kwarg,
            spec.defaults,
        )
    text = f"({ast.unparse(spec)})"
    return text + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def block(kind: str, name: str, signature: str, body: str, colons: int) -> str:
    fence = ":" * colons
    return f"{fence}{{py:{kind}}} {name}{signature}\n\n{body.strip()}\n{fence}"


def words(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "").strip()


def function(node: ast.FunctionDef, name: str, comments: dict[int, str], kind: str = "function") -> str:
    "A function or a method."
    said, returned = docments(node, comments)
    lines = [f"- {names}: {text}" for names, text in said]
    if returned:
        lines.append(f"- *returns* {returned}")
    signed = "" if kind == "property" else signature(node, kind == "method")
    return block(
        "property" if kind == "property" else kind,
        name,
        signed,
        "\n\n".join(part for part in (words(node), "\n".join(lines)) if part),
        4,
    )


def fields(node: ast.ClassDef, comments: dict[int, str]) -> list[str]:
    "The annotated fields of a dataclass or of a model, with their comments."
    lines = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_"):
            said = comments.get(line.end_lineno) or comments.get(line.lineno, "")
            if not said and isinstance(line.value, ast.Call):
                said = next(
                    (
                        ast.literal_eval(word.value)
                        for word in line.value.keywords
                        if word.arg == "description" and isinstance(word.value, ast.Constant)
                    ),
                    "",
                )
            kind = ast.unparse(line.annotation)
            if not kind.startswith("ClassVar"):
                lines.append(f"- `{line.target.id}: {kind}`" + (f": {said}" if said else ""))
    return lines


def a_class(node: ast.ClassDef, name: str, comments: dict[int, str]) -> str:
    parts, inside = [words(node)], []
    made = next((child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"), None)
    if made:
        said, _ = docments(made, comments)
        parts.append("\n".join(f"- {names}: {text}" for names, text in said))
    elif listed := fields(node, comments):
        parts.append("\n".join(listed))
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            marks = {getattr(mark, "id", getattr(mark, "attr", "")) for mark in child.decorator_list}
            kind = "property" if marks & {"property", "cached_property"} else "method"
            inside.append(function(child, child.name, comments, kind))
    signed = signature(made, True).split(" -> ")[0] if made else ""
    return block("class", name, signed, "\n\n".join(part for part in [*parts, *inside] if part), 5)


def api_of(
    module: str,  # such as product_recs.models.als
    cells: list[str],  # sources of its exported cells
) -> str:  # Markdown of MyST; empty where it offers nothing
    "Every public function and class of a module."
    parts = []
    for source in cells:
        comments = comments_of(source)
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                parts.append(function(node, node.name, comments))
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                parts.append(a_class(node, node.name, comments))
    if not parts:
        return ""
    return f":::{{py:module}} {module}\n:::\n\n" + "\n\n".join(parts)
