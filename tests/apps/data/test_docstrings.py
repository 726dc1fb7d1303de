from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from moe_plugin.apps.data.docstrings import split_docstrings


def reference_docstrings(source: str) -> list[str]:
    nodes = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return sorted(doc for node in nodes if (doc := ast.get_docstring(node)) is not None)


class TestSplitDocstrings:
    def test_module_with_docstrings_parts_code_and_prose(self):
        source = '"""Top é."""\nx = 1\n\n\ndef f(a):\n    """Adds.\n\n    More.\n    """\n    return "kept"\n'
        code, prose = split_docstrings(source)
        assert code == 'x = 1\n\n\ndef f(a):\n    return "kept"\n'
        assert prose == "Top é.\n\nAdds.\n\nMore."

    def test_body_of_only_a_docstring_stays_valid(self):
        code, prose = split_docstrings('class E(Exception):\n    """Raised."""\n')
        assert code == "class E(Exception):\n    ...\n"
        assert prose == "Raised."

    def test_docstring_beside_another_statement_stays_valid(self):
        code, _ = split_docstrings('def f(): "é doc"; return 1\n')
        assert code == "def f(): ...; return 1\n"

    def test_nested_in_a_block_is_found(self):
        _, prose = split_docstrings(
            'try:\n    pass\nexcept E:\n    def f():\n        """Deep."""\n        return 1\n'
        )
        assert prose == "Deep."

    def test_source_that_does_not_parse_is_code(self):
        assert split_docstrings("print 'two'\n") == ("print 'two'\n", "")

    def test_file_without_last_newline_is_cut_at_its_end(self):
        assert split_docstrings('"""Only."""') == ("", "Only.")

    @pytest.mark.parametrize("module", [ast, inspect, pytest])
    def test_real_module_loses_exactly_its_docstrings(self, module):
        source = Path(inspect.getfile(module)).read_text(encoding="utf-8")
        code, prose = split_docstrings(source)
        assert reference_docstrings(code) == []
        assert sorted(prose) == sorted("\n\n".join(reference_docstrings(source)))
