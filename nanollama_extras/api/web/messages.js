'use strict';
// The messages of a conversation on the page, and how an answer is painted while it is written.
const log = $('log'), input = $('input');
const touch = matchMedia('(hover: none)');  // there is no Shift+Enter, and focus opens a keyboard
const ready = () => { if (!touch.matches) input.focus(); };
const ENDINGS = {
  stop: '', tool_calls: '', length: 'cut off at the token limit', stopped: 'stopped'};
const nodes = new WeakMap();  // message -> its article
let atEnd = true;  // the log follows an answer only while its end is in sight

function article(chat, message) {
  const text = el('div', {className: 'text'}), actions = el('div', {className: 'actions'});
  const mine = message.role === 'user';
  const node = el('article', {className: mine ? 'user' : 'assistant'},
    el('h2', {className: 'sr'}, mine ? 'You' : 'Answer'), text, actions);
  nodes.set(message, node);
  (mine ? question : reply)(chat, message, node, text, actions);
  return node;
}
function question(chat, message, node, text, actions) {
  const arrows = el('span', {className: 'versions'});
  text.textContent = message.content;
  for (const one of message.files ?? []) {
    const {name, text: body, tokens} = one;
    if (one.small) { text.before(pictureNode(one)); continue; }
    const summary = el('summary', {}, icon('file'), name, tokens ? ` · ${count(tokens, 'token')}` : '');
    text.before(el('details', {className: 'file'}, summary, el('pre', {tabIndex: 0}, body)));
  }
  text.hidden = !message.content;
  actions.append(copyButton('Copy', () => message.content),
    iconButton('edit', 'Edit', () => edit(chat, message, node)), arrows);
  node.update = () => { drawVersions(chat, message, arrows); return []; };
}
function reply(chat, message, node, text, actions) {
  const summary = el('summary'), thoughts = el('div', {className: 'md'}), note = el('span');
  const details = el('details', {className: 'thoughts'}, summary, thoughts);
  const thinking = new Markdown(thoughts), writing = new Markdown(text);
  const calls = el('div'), arrows = el('span', {className: 'versions'});
  const tokens = el('div', {className: 'tokens', role: 'group',
    ariaLabel: 'Tokens and their probabilities: arrow keys go through them, Enter opens one'});
  const more = iconText('on', 'Continue', () => answer(chat, null, message), 'continue');
  text.className = 'md text';
  text.after(tokens, calls);
  watchTokens(tokens, {tokens: () => message.tokens, choose: (...other) => branch(chat, message, ...other),
    stages: (at) => stagesOf(chat, message, at)});
  note.className = 'note';
  actions.append(copyButton('Copy', () => message.content),
    iconButton('again', 'Regenerate', () => answerAgain(chat, message), 'again'),
    iconButton('tokens', 'Show its prompt', () => showPrompt(chat, message)), arrows, more, note);
  node.update = () => {  // returns the blocks that have become final
    const live = runs.get(chat.id)?.message === message, said = writing.done;
    node.classList.toggle('live', live);
    if (message.reasoning) text.before(details);
    summary.textContent = live && !message.content ? 'Thinking…'
      : message.thought ? `Thought for ${message.thought} s` : 'Thoughts';
    thinking.update(message.reasoning ?? '');
    writing.update(message.content);
    text.hidden = hasXray(message);
    tokens.hidden = !hasXray(message);
    if (hasXray(message)) drawTokens(tokens, message);
    if (message.finish === 'tool_calls' && message.calls) {
      calls.replaceChildren(...message.calls.map((one) => callNode(chat, message, one)));
    }
    if (calls.nextSibling !== actions) calls.nextSibling.remove();
    if (message.error) calls.after(failure(chat, message));
    const ending = live || message.error ? '' : ENDINGS[message.finish] ?? 'interrupted';
    const plain = settings.xray && !live && message.content && !message.tokens && 'made without probabilities';
    note.textContent = [models.length > 1 && message.model, message.note, ending, plain].filter(Boolean)
      .join(' · ');
    more.hidden = live || !(message.content || message.reasoning) || message.calls
      || ['stop', 'tool_calls'].includes(message.finish);
    drawVersions(chat, message, arrows);
    return [...text.childNodes].slice(said, live ? writing.done : undefined);
  };
  node.update();
}
function drawVersions(chat, message, arrows) {  // ‹ 2 / 3 ›
  const all = versions(chat, message), at = all.indexOf(message);
  const place = `${at + 1} / ${all.length}`;
  arrows.hidden = all.length < 2;
  if (arrows.hidden || arrows.dataset.at === place) return;
  arrows.dataset.at = place;
  const turn = (name, label, step) => {
    const one = iconButton(name, label, () => {
      choose(chat, all[at + step]);
      const again = [...nodes.get(all[at + step]).querySelectorAll('.versions button')];
      (again.find((other) => other.ariaLabel === label && !other.disabled)
        ?? again.find((other) => !other.disabled))?.focus();
    });
    one.disabled = !all[at + step];
    return one;
  };
  arrows.replaceChildren(turn('left', 'Earlier version', -1), place, turn('right', 'Later version', 1));
  if (message.name) arrows.append(el('span', {}, message.name));
}
function callNode(chat, message, one) {  // a call with its result, or with the question for it
  const shown = `${one.name}(${one.arguments})` + (one.server ? ` on ${one.server}` : '');
  if (isDecided(one)) {
    return el('details', {className: 'call'}, el('summary', {}, icon('tool'), shown),
      el('pre', {tabIndex: 0}, one.result));
  }
  const node = el('div', {className: 'call', role: 'group', ariaLabel: `Call of ${one.name}`},
    icon('tool'), el('b', {}, shown), el('br'));
  if (pending.has(one)) node.append('Running…');
  else if (path(chat).at(-1) !== message) node.append('Not run.');
  else {
    node.append(button('Run', () => decide(chat, message, one, true), 'primary'),
      button('Refuse', () => decide(chat, message, one, false), 'plain'));
  }
  return node;
}
function failure(chat, message) {
  const {error} = message, details = [error.status && `Error ${error.status}`, error.text];
  const node = el('div', {className: 'error', role: 'alert'}, el('b', {}, `${inWords(error)}.`),
    ' ', el('p', {}, details.filter(Boolean).join(': ')));
  if (error.status === 401) {
    node.append(button('Enter the API key', () => askKey(error.text), 'plain'));
  }
  if (isTooLong(error)) node.append(button('New chat', () => $('new').click(), 'plain'));
  node.append(button('Try again', () => answerAgain(chat, message), 'plain again'));
  return node;
}
function edit(chat, message, node) {
  const area = el('textarea', {value: message.content, ariaLabel: 'Edit the message', dir: 'auto'});
  const cancel = () => { box.replaceWith(node); ready(); };
  const send = () => {
    if (!area.value.trim() && !message.files) return;
    stop(chat);
    ask(chat, area.value, message.files, parentOf(chat, chat.messages.indexOf(message)));
  };
  const box = el('div', {className: 'edit'}, area, el('div', {}, 'The earlier version is kept.',
    button('Cancel', cancel), button('Send', send, 'primary')));
  box.onkeydown = (event) => {
    if (event.key === 'Escape') { event.stopPropagation(); cancel(); }
    if (event.target === area && sends(event)) send();
  };
  node.replaceWith(box);
  area.focus();
}
function paintSoon(run) {  // painting takes a fifth of the time at most, however long the answer
  run.timer ??= setTimeout(() => requestAnimationFrame((start) => {
    run.timer = null;
    if (runs.get(run.chat.id) !== run) return;
    paint(run);
    if (start > run.saved + 1000) { run.saved = start; write(run.chat); }
    run.cost = performance.now() - start;
  }), 4 * run.cost);
}
function paint({message}) {
  const node = nodes.get(message), fresh = node.update();
  if (!node.isConnected) return;
  $('spoken').append(...fresh.map(({textContent}) => el('p', {textContent})));
  follow();
}
const follow = () => { if (atEnd) log.scrollTop = log.scrollHeight; };
function show() {
  const said = path(current);
  log.replaceChildren(...said.map((one) => nodes.get(one) ?? article(current, one)));
  for (const one of said) nodes.get(one).update();
  if (!said.length) log.append(welcome());
  $('spoken').replaceChildren();
  $('title').value = current.title;
  $('down').hidden = atEnd = true;
  follow();
  refresh();
}
