"""What the chat page makes of an answer's text, a hostile one's too."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

import re
from typing import Any

from browsing import (  # noqa: F401 (fixtures)
    MARKS,
    Answer,
    ScriptedServer,
    ask,
    browser,
    context,
    expect,
    last,
    page,
    page_server,
    says,
    texts,
)

pytestmark = MARKS


HOSTILE = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> **<b onclick=hack()>bold</b>** `<i>`

[a](javascript:alert(1)) [b](data:text/html,x) [c](https://example.com/?a=1&b=<i>)
[d](https://example.com/d "title") ![image](https://example.com/x.png) <https://example.com/e>

```html"><script>
</code></pre><script>window.hacked = 3</script>
```
| <u>x</u> | y |
|---|---|
| <script>window.hacked = 4</script> | [z](vbscript:x) |
"""


def test_what_a_model_writes_stays_text(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        answer.think(HOSTILE)
        answer.say(HOSTILE, size=3)
        answer.finish()

    page_server.script = script
    ask(page, HOSTILE, "window.hacked = 4")
    page.locator("article summary").click()
    page.get_by_label("Title of the conversation").fill(HOSTILE[:80])
    page.reload()
    tags = page.evaluate("[...log.querySelectorAll('*')].map((node) => node.localName)")
    made = "article h2 div p strong code pre a table tr th td button details summary span svg use"
    assert set(tags) <= set(made.split())
    assert page.evaluate("window.hacked") is None
    shown = last(page).inner_text()
    for line in ("<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 2">'):
        assert line in shown
    assert "[a](javascript:alert(1)) [b](data:text/html,x)" in shown
    links = last(page).locator("a").evaluate_all("(all) => all.map((a) => [a.href, a.rel])")
    hosts = {"https://example.com/d", "https://example.com/x.png", "https://example.com/e"}
    assert {href for href, _ in links} >= hosts
    assert all(re.match("https://example.com/", href) for href, _ in links)
    assert all(rel == "noopener noreferrer" for _, rel in links)


MARKDOWN = {
    "# One\n### Three #\ntext": "<h3>One</h3><h5>Three</h5><p>text</p>",
    "a **b *c*** d_e_f _g_ ~~h~~ `i *j*`": "<p>a <strong>b <em>c</em></strong> d_e_f <em>g</em>"
    " <del>h</del> <code>i *j*</code></p>",
    "2 * 3 * 4 and 2**3**": "<p>2 * 3 * 4 and 2<strong>3</strong></p>",
    r"\*not\* **open and `open": "<p>*not* **open and `open</p>",
    "- a\n- b\n  - c\n\n    d\n- e\n\nf": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p>"
    "<p>d</p></li></ul></li><li><p>e</p></li></ul><p>f</p>",
    "3. a\n4. b\n- c": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'
    "<ul><li><p>c</p></li></ul>",
    "> a\n> > b\n\n---": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><hr>",
    "a | b\n:-- | --:\n1 | `2`\n": "<table><tr><th>a</th><th>b</th></tr>"
    "<tr><td>1</td><td><code>2</code></td></tr></table>",
    "```py\nx = 1\n\n  y\n```\nz": "<pre><code>x = 1\n\n  y</code></pre><p>z</p>",
    "- [x] a\n- [ ] b\n- [] c": '<ul><li><p><input type="checkbox"> a</p></li><li><p>'
    '<input type="checkbox"> b</p></li><li><p>[] c</p></li></ul>',
    "![a cat](https://a.b/c.png)": '<p><a href="https://a.b/c.png">Image: a cat</a></p>',
    "US$5 and $10, then $20 or $\n$": "<p>US$5 and $10, then $20 or $\n$</p>",
    "- a\n  ~~~\n  x\n   y": "<ul><li><p>a</p><pre><code>x\n y</code></pre></li></ul>",
    "see https://a.b/c_(d), ok": '<p>see <a href="https://a.b/c_(d">https://a.b/c_(d</a>), ok</p>',
}

RENDER = """([texts]) => texts.map((text) => {
    const root = document.createElement('div');
    new Markdown(root).update(text);
    for (const node of root.querySelectorAll('.code > div')) node.remove();
    for (const node of root.querySelectorAll('code span')) node.replaceWith(node.textContent);
    for (const node of root.querySelectorAll('.code, .table')) node.replaceWith(...node.childNodes);
    for (const node of root.querySelectorAll('*')) {
        for (const name of node.getAttributeNames()) {
            if (!['href', 'start', 'type'].includes(name)) node.removeAttribute(name);
        }
    }
    return root.innerHTML;
})"""


def test_markdown(page: Any) -> None:
    rendered = page.evaluate(RENDER, [list(MARKDOWN)])
    assert dict(zip(MARKDOWN, rendered)) == MARKDOWN


def test_markdown_that_arrives_in_pieces_equals_the_whole(page: Any) -> None:
    """Any cut of any text: seeded pseudo-random documents, each compared after every piece."""
    differing = page.evaluate(
        r"""() => {
        let state = 1;
        const random = (n) => (state = state * 48271 % 2147483647) % n;
        const words = ['a', 'b c', '\n', '\n', '\n\n', '  ', '    ', '- ', '1. ', '12', '# ', '> ',
            '```', '`', '**', '*', '_', '|', '|--', '-', '---\n', '\t', '[x](https://y.z)', '~~~py',
            '$$', '$', '\\(', '\\)', '\\[', '\\]', '- [x] ', 'é🦙', '\\', '<b>', '~~'];
        const html = (text) => {
            const root = document.createElement('div');
            new Markdown(root).update(text);
            return root.innerHTML;
        };
        const bad = [];
        for (let document_ = 0; document_ < 400; document_++) {
            const root = document.createElement('div'), grown = new Markdown(root);
            let text = '';
            for (let piece = 0; piece < 40; piece++) {
                text += words[random(words.length)];
                grown.update(text);
                if (root.innerHTML !== html(text)) { bad.push(text); break; }
            }
        }
        return bad;
    }"""
    )
    assert differing == []


def test_no_answer_hangs_the_page(page: Any) -> None:
    """Texts that cost a careless parser quadratic time, or its stack."""
    seeds = ["**a ", "_a ", "*", "[", "[a](", "`", "``a", "> ", "- ", "|", "~~a", "__a ", "*a **b "]
    seeds += ["$a ", "$$a", "\\(a", "\\[a\n", "- [ ] a\n", "```py\n'\n", "![a](", "```js\n`${"]
    seeds += ["  " * 50 + "- x\n", "a|b\n", "# # ", "\\", "<", "https://a", "1. \n\n", "- - - a\n"]
    render = "(text) => new Markdown(document.createElement('div')).update(text).localName"
    for seed in seeds:
        assert page.evaluate(render, seed * (100_000 // len(seed)) + "end") == "div"


def test_a_code_block_can_be_copied(page: Any, page_server: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "def f(x):\n\treturn x < 1\n\n# ü"
    page_server.script = says(f"Look:\n\n```python\n{code}\n```\nDone.")
    ask(page, "Code?", "Done.")
    page.get_by_label("Copy code").click()
    expect(page.locator("#spoken")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.evaluate("delete Navigator.prototype.clipboard")  # as on plain http
    page.locator("#input").fill("")
    page.get_by_label("Copy", exact=True).last.click()
    page.locator("#input").press("Control+v")
    expect(page.locator("#input")).to_have_value(f"Look:\n\n```python\n{code}\n```\nDone.")


# ---- colours and formulas -----------------------------------------------------------------------


def test_code_has_colours(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says(
        "```py\ndef f(x):\n    return 'a'\n```\n\n```oops\ndef f(x)\n```\nDone."
    )
    ask(page, "Code?", "Done.")
    first, second = page.locator("pre code").all()
    kinds = first.locator("span").evaluate_all(
        "(all) => all.map((n) => [n.className, n.textContent])"
    )
    assert ["t-keyword", "def"] in kinds
    assert ["t-string", "'a'"] in kinds
    expect(first).to_have_text("def f(x):\n    return 'a'")
    expect(second.locator("span")).to_have_count(0)
    colour = "(node) => getComputedStyle(node).color"
    assert first.locator(".t-keyword").first.evaluate(colour) != first.evaluate(colour)


FORMULAS = {
    "$x^2$": "msup",
    r"\(\sqrt{2}\)": "msqrt",
    "$$\n\\sum_{i=0}^n i\n$$": "munderover",
    r"\[ \begin{pmatrix} a & b \\ c & d \end{pmatrix} \]": "mtable",
    r"| $\frac{a}{b}$ | c |" + "\n|--|--|\n| d | e |": "th mfrac",
    r"- **the $\alpha$ value**": "li strong mi",
}


def test_formulas(page: Any) -> None:
    for text, selector in FORMULAS.items():
        page.evaluate("(text) => log.replaceChildren(new Markdown(el('div')).update(text))", text)
        expect(page.locator(selector).first).to_be_attached()
        expect(page.locator(".tex.raw")).to_have_count(0)


HOSTILE_TEX = [
    r"\href{javascript:hack()}{x}",
    r"\url{javascript:hack()}",
    r"\includegraphics{https://example.com/x.png}",
    r"\htmlData{onclick=hack()}{x}\class{actions}{x}\id{log}{x}\style{background:url(https://example.com)}{x}",
    r"\text{<img src=x onerror=hack()>}",
    r"\color{red;background:url(https://example.com/y)}x",
    r"\rule{9999em}{9999em}",
    r"\def\a{\a\a}\a",
    r"\newcommand\b{\b}\b",
    "{" * 3000,
    "x^" * 500,
]


def test_hostile_formulas_do_nothing(page: Any) -> None:
    page.evaluate("() => { window.hack = () => { window.hacked = 1 } }")
    page.evaluate("(text) => { new Markdown(log).update(text) }", "$x$")
    expect(page.locator("math")).to_have_count(1)
    for tex in HOSTILE_TEX:
        page.evaluate("(tex) => log.replaceChildren(formula(tex, true, tex))", tex)
        names = page.evaluate(
            "[...log.querySelectorAll('*')].flatMap((n) => n.getAttributeNames())"
        )
        assert not {"href", "src", "id", "onclick", "data-onclick"} & set(names), tex
        tags = page.evaluate("[...log.querySelectorAll('*')].map((n) => n.localName)")
        assert not {"a", "img", "script", "div"} & set(tags), tex
        assert page.evaluate("log.scrollWidth") <= 4000, tex
        assert page.evaluate("window.hacked") is None, tex
