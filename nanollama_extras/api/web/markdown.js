'use strict';
// Markdown: lines -> blocks -> nodes. Prism colours code; Temml, loaded when it is first needed,
// sets formulas. Both deliver trees, from which the nodes are made here.
const FENCE = /^( *)(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/, HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/, QUOTE = /^\s*> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s{1,4}|$)/, INTERRUPTS = /^\s*([-*+]|\d\d?[.)])\s+\S/;
const TASK = /^\[([ xX])\]\s+(?=\S)/, DISPLAY = /^\s*(\$\$|\\\[)/;
const MAX_DEPTH = 8;  // of nesting: an answer of a thousand ">" must not exhaust the stack
const INLINE = new RegExp([  // spans are bounded: unclosed markers must not cost quadratic time
  /(?<tick>`+)(?!`)(?<code>[^]{0,999}?[^`])\k<tick>(?!`)/, /\\\((?<tex>[^]{1,999}?)\\\)/,
  /\\\[(?<display>[^]{1,999}?)\\\]/, /\$\$(?<display2>[^$]{1,999})\$\$/,
  /(?<![\\\w$])\$(?<tex2>[^\s$](?:(?:[^$\\\n]|\\[^\n]){0,499}[^\s$\\])?)\$(?![\w$])/,
  /\\(?<escaped>[*_`~#|$])/,
  /(?<two>\*\*|~~|(?<!\w)__)(?=\S)(?<strong>[^]{0,999}?\S)\k<two>(?!\*)(?:(?<!_)|(?!\w))/,
  /(?<one>\*|(?<!\w)_)(?![\s*_])(?<em>(?:\*\*[^*]{1,999}\*\*|[^*]){0,999}?(?<!\s))\k<one>(?!\*)/,
  /(?<image>!)?\[(?<label>(?:[^[\]]|\[[^[\]]{0,99}\]){1,999})\]\(<?(?<link>[^\s<>]{1,999}?)>?( "[^"]*")?\)/,
  /(?<url>https?:\/\/[^\s<>`]{0,999}[^\s<>`.,:;!?'")\]}*_])/,
].map((part) => part.source).join('|'), 'g');

function inline(parent, text, depth = 0) {
  let at = 0;
  for (const match of depth < MAX_DEPTH ? text.matchAll(INLINE) : []) {
    const {code, escaped, two, strong, em, image, label, url, link: href = url} = match.groups;
    const {tex2, tex = tex2, display2, display = display2} = match.groups;
    parent.append(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (code) parent.append(el('code', {}, code.replace(/^ (.+) $/s, '$1')));
    else if (tex) parent.append(formula(tex, false, match[0]));
    else if (display) parent.append(formula(display, true, match[0]));
    else if (escaped) parent.append(escaped);
    else if (strong) parent.append(inline(el(two === '~~' ? 'del' : 'strong'), strong, depth + 1));
    else if (em) parent.append(inline(el('em'), em, depth + 1));
    else if (!/^https?:\/\//i.test(href)) parent.append(match[0]);  // no javascript: or data:
    else {
      const anchor = el('a', {href, title: href, target: '_blank', rel: 'noopener noreferrer'});
      if (image) anchor.append('Image: ');  // it is not fetched: that would tell others of the chat
      parent.append(inline(anchor, label ?? url, label ? depth + 1 : MAX_DEPTH));
    }
  }
  parent.append(text.slice(at));
  return parent;
}
function list(lines, at, depth) {
  const [, pad, marker] = ITEM.exec(lines[at]), ordered = /\d/.test(marker);
  const node = ordered ? el('ol', {start: parseInt(marker)}) : el('ul');
  for (let item; (item = ITEM.exec(lines[at] ?? '')) && /\d/.test(item[2]) === ordered;) {
    const body = [lines[at].slice(item[0].length)], [task, mark] = TASK.exec(body[0]) ?? [];
    for (at++; at < lines.length; at++) {
      const line = lines[at].replace(/^\t/, '    '), indent = line.search(/\S/);
      const lazy = body.at(-1).trim() && !ITEM.test(line) && !interrupts(lines, at);
      if (indent >= 0 && indent < pad.length + 2 && !lazy) break;
      body.push(line.slice(Math.min(Math.max(indent, 0), item[0].length)));
    }
    if (task) body[0] = body[0].slice(task.length);
    const entry = nested(el('li'), body, depth);
    if (task) {
      const done = mark !== ' ', ariaLabel = done ? 'Done' : 'To do';
      const box = el('input', {type: 'checkbox', defaultChecked: done, disabled: true, ariaLabel});
      (entry.firstChild?.localName === 'p' ? entry.firstChild : entry).prepend(box, ' ');
      entry.className = 'task';
    }
    node.append(entry);
  }
  return [node, at];
}
const cells = (row) => row.trim().replace(/^\||\|$/g, '').split(/(?<!\\)\|/);
const isTable = ([head, rule]) => head.includes('|') && /^[\s|:-]*-[\s|:-]*$/.test(rule ?? '')
  && cells(head).length === cells(rule).length;
function table(lines, at) {
  const sides = cells(lines[at + 1]).map((cell) => !/-+:\s*$/.test(cell) ? ''
    : /^\s*:/.test(cell) ? 'center' : 'right');
  const row = (line, tag) => el('tr', {}, ...cells(line).slice(0, sides.length).map((cell, i) => {
    const node = inline(el(tag), cell.trim().replace(/<br ?\/?>/gi, '\n'));
    node.style.textAlign = sides[i];
    return node;
  }));
  const node = el('table', {}, row(lines[at], 'th'));
  for (at += 2; lines[at]?.includes('|'); at++) node.append(row(lines[at], 'td'));
  const label = {role: 'group', ariaLabel: 'Table', tabIndex: 0};
  return [el('div', {className: 'table', ...label}, node), at];
}
const interrupts = (lines, at) => isTable(lines.slice(at, at + 2))
  || [FENCE, HEADING, RULE, QUOTE, INTERRUPTS, DISPLAY].some((start) => start.test(lines[at]));

function block(lines, at, depth) {  // the block at a line that is not blank, and the line after it
  let match, end = at + 1;
  if ((match = FENCE.exec(lines[at]))) {
    const [, pad, fence, language] = match, margin = RegExp(`^ {0,${pad.length}}`);
    const closes = (line) => line.length >= fence.length && line === fence[0].repeat(line.length);
    while (end < lines.length && !closes(lines[end].trim())) end++;
    const text = lines.slice(at + 1, end).map((line) => line.replace(margin, '')).join('\n');
    const code = el('code', {}, ...coloured(text, language));
    const copy = copyButton('Copy code', () => code.textContent);
    return [el('div', {className: 'code'}, el('div', {}, language || 'text', copy),
      el('pre', {tabIndex: 0}, code)), end + 1];
  }
  if ((match = HEADING.exec(lines[at]))) {  // h1 and h2 belong to the page
    const node = el(`h${Math.min(match[1].length + 2, 6)}`);
    return [inline(node, match[2].replace(/\s#+\s*$/, '')), end];
  }
  if (RULE.test(lines[at])) return [el('hr'), end];
  if ((match = DISPLAY.exec(lines[at]))) {  // to its end, or to a blank line
    const close = match[1] === '$$' ? '$$' : '\\]';
    let [text, isOpen] = [lines[at].slice(match[0].length), true];
    while ((isOpen = !text.includes(close)) && lines[end]?.trim()) text += `\n${lines[end++]}`;
    const [tex, rest] = [text.slice(0, text.indexOf(close)), text.split(close).slice(1).join('')];
    return [isOpen || rest.trim() || !tex.trim()
      ? inline(el('p'), lines.slice(at, end).join('\n'))
      : el('div', {className: 'display', tabIndex: 0}, formula(tex, true, match[1] + tex + close)), end];
  }
  if (QUOTE.test(lines[at]) && depth < MAX_DEPTH) {
    while (QUOTE.test(lines[end] ?? '')) end++;
    const body = lines.slice(at, end).map((line) => line.replace(QUOTE, ''));
    return [nested(el('blockquote'), body, depth), end];
  }
  if (ITEM.test(lines[at]) && depth < MAX_DEPTH) return list(lines, at, depth);
  if (isTable(lines.slice(at, at + 2))) return table(lines, at);
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  return [inline(el('p'), lines.slice(at, end).join('\n')), end];
}
const nested = (root, lines, depth) => new Markdown(root, depth + 1).update(lines.join('\n'));
class Markdown {  // text that grows: blocks which more text cannot change are built once
  constructor(root, depth = 0) { Object.assign(this, {root, depth, start: 0, done: 0}); }
  update(text) {
    const lines = text.slice(this.start).split('\n');
    let count = this.done, first = 0;
    for (let at = 0, node; at < lines.length;) {
      if (!lines[at].trim()) { at++; continue; }
      // Two whole lines fix where a block begins (a table shows in its second): all before is done.
      if (at <= lines.length - 3) [first, this.done] = [at, count];
      [node, at] = block(lines, at, this.depth);
      this.put(count++, node);
    }
    while (this.root.childNodes.length > count) this.root.lastChild.remove();
    for (const line of lines.slice(0, first)) this.start += line.length + 1;
    return this.root;
  }
  put(index, node) {  // an equal block stays, with its selection; a code block keeps its scroll
    const old = this.root.childNodes[index];
    if (!old) this.root.append(node);
    else if (node.className === 'code' && old.firstChild.isEqualNode(node.firstChild)) {
      old.querySelector('code').replaceChildren(...node.querySelector('code').childNodes);
    } else if (!old.isEqualNode(node)) old.replaceWith(node);
  }
}

// ---- colours of code ---------------------------------------------------------------------------
const MAX_COLOURED = 20_000;  // characters; longer code, or a longer line, stays plain
const LANGUAGES = {zsh: 'bash', console: 'bash', fish: 'bash', 'c++': 'cpp', cc: 'cpp', h: 'c',
  hpp: 'cpp', rs: 'rust', golang: 'go', jsx: 'javascript', tsx: 'typescript', mjs: 'javascript',
  jsonc: 'javascript', json5: 'javascript', jsonl: 'json', patch: 'diff', py3: 'python',
  postgresql: 'sql', sqlite: 'sql', mysql: 'sql', kotlin: 'java', cs: 'java', csharp: 'java'};
function coloured(text, language) {  // the text as nodes
  const name = language.toLowerCase(), grammars = Prism.languages;
  const key = LANGUAGES[name] ?? name, grammar = Object.hasOwn(grammars, key) && grammars[key];
  const isLong = text.length > MAX_COLOURED || /[^\n]{2000}/.test(text);
  if (typeof grammar !== 'object' || isLong) return [text];
  return Prism.tokenize(text, grammar).map(tokenNode);
}
function tokenNode(token) {
  if (typeof token === 'string') return token;
  const inner = Array.isArray(token.content) ? token.content : [token.content];
  return el('span', {className: `t-${token.type}`}, ...inner.map(tokenNode));
}

// ---- formulas ----------------------------------------------------------------------------------
const MATHML = 'http://www.w3.org/1998/Math/MathML';
const MATH_NAMES = new Set(`math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom
  mprescripts mroot mrow ms mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder
  munderover none`.split(/\s+/));
const MATH_ATTRIBUTES = new Set(`accent accentunder columnspan depth dir display displaystyle fence
  form height mathbackground largeop linethickness lspace mathcolor mathsize mathvariant maxsize minsize
  movablelimits notation rowspan rspace scriptlevel separator stretchy symmetric voffset
  width`.split(/\s+/));
// The only script that this page may load later on, and by nobody else
const TEMML = globalThis.trustedTypes?.createPolicy('temml', {createScriptURL: () => './?temml'});
let library = null, unset = [];  // Temml; the formulas that wait for it
function formula(tex, display, source) {  // its source as text until Temml is there
  const node = el('span', {className: 'tex'}, source);
  Object.assign(node, {tex, display});
  if (globalThis.temml) typeset(node);
  else {
    unset.push(new WeakRef(node));
    if (!library) {
      library = el('script', {src: TEMML?.createScriptURL('') ?? './?temml'});
      library.onerror = () => { library.remove(); library = null; };  // asked again with the next one
      library.onload = () => {
        unset.forEach((one) => one.deref() && typeset(one.deref()));
        unset = [];
        follow();
      };
      document.head.append(library);
    }
  }
  return node;
}
function typeset(node) {
  try {
    const tree = temml.__renderToMathMLTree(node.tex,
      {displayMode: node.display, throwOnError: true, maxExpand: 200, maxSize: [20, 20]});
    node.replaceChildren(mathNode(tree));
  } catch { node.classList.add('raw'); }  // what it cannot read stays as it was written
}
const isHuge = (size) => Math.abs(parseFloat(size)) > 100;  // more em than a page is wide
function mathNode(tree) {
  if (tree.text !== undefined) return tree.text;
  const children = (tree.children ?? []).map(mathNode);
  if (!MATH_NAMES.has(tree.type)) {
    const span = document.createElementNS(MATHML, 'mrow');
    span.append(...children);
    return span;
  }
  const node = document.createElementNS(MATHML, tree.type);
  for (const [name, value] of Object.entries(tree.attributes)) {
    if (MATH_ATTRIBUTES.has(name) && !isHuge(value)) node.setAttribute(name, value);
  }
  node.setAttribute('class', tree.classes.filter(Boolean).join(' '));
  for (const [name, value] of Object.entries(tree.style)) {
    if (!/url|image/i.test(name + value) && !isHuge(value)) node.style[name] = value;
  }
  node.append(...children);
  return node;
}
