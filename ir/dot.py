"""Graphs as Graphviz text, for pictures."""

from __future__ import annotations

from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph


def as_dot(graph: Graph, title: str = "graph") -> str:
    """Graphviz text: a box a node, a cluster a recurrence; dashed edges carry a state to the next step."""
    body = _Drawing().graph(graph, "", "  ")
    return "\n".join([f"digraph {_quoted(title)} {{", "  rankdir=TB;", "  node [shape=box];", *body, "}"]) + "\n"


def _quoted(text: str) -> str:
    """A quoted string that shows the text as it is; Graphviz reads backslashes in labels as escapes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\0", "")
    return f'"{escaped}"'


def _label(node: N.AnyNode) -> str:
    what = f"{node.kind} {node.fn}" if hasattr(node, "fn") else node.kind
    return f"{node.id}\n{what}\n{node.dtype}[{', '.join(node.axes)}]"


class _Drawing:
    """Lines of a drawing; a node's name in it is its path through the recurrences around it."""

    def graph(self, graph: Graph, path: str, indent: str) -> list[str]:
        lines: list[str] = []
        for node in graph.nodes:
            if isinstance(node, N.Recur):
                lines += self.recurrence(node, path, indent)
                continue
            shape = " shape=box3d" if isinstance(node, N.Scan) else ""
            lines.append(f"{indent}{_quoted(path + node.id)} [label={_quoted(_label(node))}{shape}];")
            if isinstance(node, N.Out):
                lines.append(self.edge(self.source(graph, node, path), path + node.id, indent))
            else:
                lines += [self.edge(path + a, path + node.id, indent) for a in dict.fromkeys(node.operands())]
        for name, id_ in graph.outputs if not path else ():
            lines.append(f"{indent}{_quoted(f'output {name}')} [label={_quoted(name)} shape=oval];")
            lines.append(self.edge(id_, f"output {name}", indent))
        return lines

    def recurrence(self, node: N.Recur, path: str, indent: str) -> list[str]:
        """A cluster with the body; then the edges into and around it."""
        inner = f"{path}{node.id}/"
        title = f"{node.id}: recurrence over {node.axis}" + (f"\n{node.reason}" if node.reason else "")
        lines = [f"{indent}subgraph {_quoted(f'cluster {path}{node.id}')} {{", f"{indent}  label={_quoted(title)};"]
        lines += self.graph(node.body, inner, indent + "  ")
        lines.append(f"{indent}}}")
        states = {n.name: n.id for n in node.body.nodes if isinstance(n, N.State)}
        for n in node.body.nodes:
            if isinstance(n, N.Capture):
                lines.append(self.edge(path + n.outer, inner + n.id, indent))
        for c in node.carried:
            if c.name in states:
                to = inner + states[c.name]
                lines.append(self.edge(inner + c.result, to, indent, " [style=dashed constraint=false]"))
                lines += [self.edge(path + c.initial, to, indent)] if c.initial else []
        return lines

    def source(self, graph: Graph, node: N.Out, path: str) -> str:
        """What a result is drawn from: the value in the body, or the node itself."""
        of = graph[node.arg]
        if not isinstance(of, N.Recur):
            return path + node.arg
        results = [id_ for _, id_ in of.body.outputs] + [c.result for c in of.carried]
        return f"{path}{node.arg}/{results[node.index]}"

    def edge(self, start: str, end: str, indent: str, style: str = "") -> str:
        return f"{indent}{_quoted(start)} -> {_quoted(end)}{style};"
