'use strict';
// The X-ray of an answer: tokens shaded by their probability, with what else could have stood there
// on a card. Log-probabilities are OpenAI's; the stages of the sampler are this server's own.
// A token of a message is [text, logprob, id, others]; one of the others is [text, logprob, id, ends].
// An id is null where the server tells none; `ends`: the answer ends with this token.
const NUM_OTHERS = 5;
const ODD = Math.log(0.1);  // less is surprising, unless nothing is likelier
const hasXray = ({tokens}) => Boolean(settings.xray && tokens?.length);
const isToken = (one) => Array.isArray(one) && isText(one[0]) && typeof one[1] === 'number'
  && areAll(one[3] ?? [], (other) => isText(other?.[0]) && typeof other[1] === 'number');

function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  return share < 0.05 ? '< 0.1 %' : `${share.toFixed(share < 9.95 ? 1 : 0)} %`;
}
const visible = (text) => text.replace(/\n/g, '⏎').replace(/\t/g, '⇥');
const isOdd = ([, logprob, , others]) => logprob < ODD && others.some(([, other]) => other > logprob);
const rounded = (number) => Math.round(number * 1e3) / 1e3;

function takeTokens(run, entries) {  // the log-probabilities of a chunk
  run.decoder ??= new TextDecoder();  // a character may be several tokens
  for (const {token, logprob, bytes: raw, id, top_logprobs: top} of entries) {
    const text = raw?.length ? run.decoder.decode(new Uint8Array(raw), {stream: true}) : token;
    const others = (top ?? []).map((one) =>
      [one.token, rounded(one.logprob), one.id ?? null, one.bytes?.length === 0]);
    (run.message.tokens ??= []).push([text, rounded(logprob), id ?? null, others]);
  }
}

// ---- tokens ------------------------------------------------------------------------------------
function shade(node, token) {
  const [text, logprob] = token;
  node.classList.add('tok');
  node.classList.toggle('odd', isOdd(token));
  node.style.setProperty('--surprise', Math.min(1, -logprob / Math.LN2 / 7).toFixed(3));
  Object.assign(node, {role: 'button', tabIndex: -1,
    ariaLabel: `${visible(text) || 'part of a character'}, ${percent(logprob)}${isOdd(token) ? ', surprising' : ''}`});
  return node;
}
const spelled = (tokens) => tokens.map(([text]) => text).join('');
function lostSpace({tokens, content}) {  // the space that an answer loses at its start
  const whole = spelled(tokens);
  return whole[0] === content[0] ? 0 : whole.length - whole.trimStart().length;
}
function drawTokens(box, message) {
  const {tokens, content} = message;
  if (box.lastChild?.nodeType === Node.TEXT_NODE) box.lastChild.remove();
  for (const token of tokens.slice(box.childElementCount)) {
    box.append(shade(el('span', {}, token[0]), token));
  }
  if (!box.querySelector('[tabindex="0"]')) box.firstChild.tabIndex = 0;
  const rest = content.slice(Math.max(0, spelled(tokens).length - lostSpace(message)));
  if (rest) box.append(rest);  // written without probabilities
}
function watchTokens(box, {tokens, choose, stages}) {  // keys and pointers; `choose` takes another token
  const open = (node, isPinned) => {
    const at = [...box.querySelectorAll('.tok')].indexOf(node);
    if (at >= 0) showCard({box, node, at, token: tokens()[at], choose, stages, isPinned});
  };
  box.onpointerover = ({target, pointerType}) => {
    if (pointerType === 'mouse' && !card.pinned && target.closest('.tok')) open(target.closest('.tok'));
  };
  box.onpointerleave = () => setTimeout(() => {
    if (!card.pinned && !card.matches(':hover')) closeCard();
  }, 250);
  box.onclick = ({target}) => { if (target.closest('.tok')) open(target.closest('.tok'), true); };
  box.addEventListener('focusin', ({target}) => {
    for (const one of box.querySelectorAll('[tabindex="0"]')) one.tabIndex = -1;
    target.tabIndex = 0;
    if (target.matches('.tok:focus-visible') && !card.pinned) open(target);
  });
  box.onkeydown = (event) => {
    const all = [...box.querySelectorAll('.tok')], at = all.indexOf(document.activeElement);
    const next = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[event.key];
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (next !== undefined) all[next]?.focus();
    else if (event.key === 'Enter' || event.key === ' ') open(all[at], true);
    else if (event.key === 'Escape' && card.matches(':popover-open')) closeCard();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
}

// ---- the card of a token -----------------------------------------------------------------------
const card = el('div', {id: 'card', popover: 'manual', role: 'dialog', tabIndex: -1});
function closeCard() {
  if (card.matches(':popover-open')) card.hidePopover();
  card.pinned = false;
}
function showCard({box, node, at, token, choose, stages, isPinned = false}) {
  const [text, logprob, , others] = token, rows = [...others];
  const place = rows.findIndex((one) => one[2] === null ? one[0] === text : one[2] === token[2]);
  if (place < 0) rows.push([text, logprob, token[2], false]);
  const taken = place < 0 ? rows.length - 1 : place, surprise = (-logprob / Math.LN2).toFixed(1);
  const head = el('p', {}, el('b', {}, `“${visible(text)}”`),
    ` token ${at + 1} · ${percent(logprob)} · ${surprise} bits`);
  const list = el('ul', {ariaLabel: choose ? 'Go on with another token' : 'Candidates'}, ...rows.map((one, i) => el('li', {}, rowOf(one, i === taken,
    choose && !one[0].includes('\uFFFD') && (() => choose(at, one))))));
  const more = el('div', {className: 'stages'});
  if (stages) {
    more.append(button('Stages of the sampler', async () => {
      more.replaceChildren('Asking the server…');
      more.replaceChildren(await stageTable(() => stages(at)));
      placeCard(node);
      card.focus();
    }, 'plain'));
  }
  card.ariaLabel = `Token ${at + 1}`;
  card.replaceChildren(head, list, more);
  card.pinned = isPinned;
  card.node = node;
  const home = box.closest('dialog') ?? document.body;
  if (card.parentNode !== home) { closeCard(); home.append(card); card.pinned = isPinned; }
  card.showPopover();
  placeCard(node);
  if (isPinned) (list.querySelector('button:enabled') ?? card).focus();
}
function rowOf([text, logprob, , ends], isTaken, act) {
  const bar = el('i', {ariaHidden: 'true'});
  bar.style.width = `${(Math.exp(logprob) * 5).toFixed(2)}rem`;
  const parts = [el('span', {}, visible(text) || '·'), bar, percent(logprob)];
  if (ends) parts[0].append(el('small', {}, 'ends the answer'));
  if (isTaken) return el('div', {className: 'taken'}, ...parts, el('span', {className: 'sr'}, 'taken'));
  return act ? el('button', {type: 'button', onclick: act}, ...parts) : el('div', {}, ...parts);
}
function placeCard(node) {
  const {left, bottom, top} = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const {offsetWidth: width, offsetHeight: height} = card;
  card.style.left = `${Math.max(8, Math.min(left, innerWidth - 8 - width))}px`;
  card.style.top = `${bottom + height + 8 > innerHeight ? Math.max(8, top - height - 4) : bottom + 4}px`;
}
card.onkeydown = (event) => {
  const all = [...card.querySelectorAll('button')], at = all.indexOf(document.activeElement);
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step && at >= 0) all[(at + step + all.length) % all.length].focus();
  else if (event.key === 'Escape') { card.node.focus(); closeCard(); }
  else return;
  event.preventDefault();
  event.stopPropagation();
};
card.onpointerleave = () => { if (!card.pinned) closeCard(); };
document.addEventListener('pointerdown', ({target}) => {
  if (!card.contains(target) && !target.closest?.('.tok')) closeCard();
});
log.addEventListener('scroll', () => { if (card.matches(':popover-open')) placeCard(card.node); });

// ---- the stages of the sampler -----------------------------------------------------------------
async function stagesOf(chat, message, at) {  // asks the server why a token was taken
  const said = path(chat, parentOf(chat, chat.messages.indexOf(message)));
  const {stream_options, ...request} = requestOf(message.settings ?? settingsOf(chat), said);
  const ids = message.tokens.slice(0, at).map(([, , id]) => id), {tools} = await lent;
  Object.assign(request, {stream: false, model: message.model ?? request.model},
    tools?.length && {tools}, {token_id: message.tokens[at][2]});
  if (message.reasoning || ids.includes(null)) {  // not all ids are known: the text stands for them
    const content = spelled(message.tokens.slice(0, at)).slice(lostSpace(message));
    if (content) request.messages.push({role: 'assistant', content});
    if (content) Object.assign(request, {continue_final_message: true, add_generation_prompt: false});
  } else request.answer_ids = ids;
  return (await post('xray', request)).json();
}
async function stageTable(ask) {
  try {
    const {candidates, stages, token_id: taken, rank, vocabulary, entropy_bits: entropy} = await ask();
    const cell = (value, kind) => el('td', {}, value === null ? '–'
      : kind === 'logit' ? value.toFixed(2) : percent(Math.log(value)));
    const row = (name, texts) => el('tr', {}, el('th', {scope: 'row'}, name),
      ...texts.map((text) => el('td', {}, text)));
    const heads = stages.map(({name, setting}) => el('th', {scope: 'col'}, `${name} ${setting}`.trim()));
    const body = candidates.map(({id, text}, i) => el('tr', {className: id === taken ? 'taken' : ''},
      el('th', {scope: 'row'}, `${id === taken ? '▸ ' : ''}${visible(text)}`),
      ...stages.map(({values, kind}) => cell(values[i], kind))));
    return el('div', {className: 'table', tabIndex: 0, role: 'group', ariaLabel: 'Stages of the sampler'},
      el('table', {}, el('caption', {}, `Rank ${rank.toLocaleString('en')} of ${vocabulary.toLocaleString('en')}`
        + ` · entropy ${entropy.toFixed(2)} bits · what each stage left`),
      el('thead', {}, el('tr', {}, el('td'), ...heads)), el('tbody', {}, ...body),
      el('tfoot', {}, row('Tokens left', stages.map(({left}) => left.toLocaleString('en'))),
        row('Removed', stages.map(({removed, removed_share: part}) =>
          removed ? `${removed.toLocaleString('en')} (${percent(Math.log(part))})` : '–')))));
  } catch (error) {
    return error.status === 404 ? 'This server does not tell the stages.' : error.message;
  }
}

// ---- branches ----------------------------------------------------------------------------------
const named = (text) => visible(text).trim() || visible(text) || '·';
function branch(chat, message, at, [text, logprob, id, ends]) {  // a version with another token
  closeCard();
  const own = message.tokens[at], kept = message.tokens.slice(0, at), {reasoning, thought} = message;
  const said = ends ? '' : text, tokens = [...kept, [said, logprob, id, own[3]]];
  const next = {role: 'assistant', content: spelled(tokens).slice(lostSpace(message)), reasoning, thought,
    model: message.model, tokens, name: `“${named(text)}” for “${named(own[0])}”`, finish: 'stop'};
  append(chat, next, parentOf(chat, chat.messages.indexOf(message)));
  say(`A new version: ${next.name}`);
  if (!ends) return answer(chat, null, next);
  next.settings = message.settings;
  keep(chat);
  show();
}

// ---- the prompt's tokens -----------------------------------------------------------------------
async function shadePrompt() {  // the boxes of the prompt view, by the probabilities of its tokens
  const box = $('prompt-text'), isOn = $('with-shares').checked, nodes = [...box.children];
  const ids = nodes.map((node) => Number(node.dataset.id));
  box.classList.toggle('shares', isOn);
  if (!isOn || !ids.length || box.tokens?.length === ids.length) return;
  const about = $('prompt-about').textContent;
  try {
    const asked = {model: $('prompt').model, prompt: ids, echo: true, logprobs: NUM_OTHERS, max_tokens: 0};
    const {choices: [{logprobs}]} = await (await post('v1/completions', asked)).json();
    if (nodes[0] !== box.firstChild) return;  // another prompt has taken its place
    box.tokens = ids.map((id, i) => [nodes[i].dataset.piece, rounded(logprobs.token_logprobs[i] ?? 0), id,
      Object.entries(logprobs.top_logprobs[i] ?? {}).map(([text, x]) => [text, rounded(x), null, false])]);
    nodes.forEach((node, i) => { shade(node, box.tokens[i]); node.title = ''; });
    nodes[0].tabIndex = 0;
    const sum = logprobs.token_logprobs.reduce((all, x) => all + (x ?? 0), 0);
    const each = Math.exp(-sum / Math.max(1, ids.length - 1)).toFixed(2);
    $('prompt-about').textContent = `${about} · perplexity ${each}`;
  } catch (error) {
    box.classList.remove('shares');
    $('with-shares').checked = false;
    $('prompt-about').textContent = `${about} · no probabilities: ${error.message}`;
  }
}
watchTokens($('prompt-text'), {tokens: () => $('prompt-text').tokens ?? []});
$('with-shares').onchange = shadePrompt;
$('prompt').onclose = () => { closeCard(); document.body.append(card); };

// ---- the switch --------------------------------------------------------------------------------
function toggleXray() {
  settings.xray = !settings.xray;
  save('settings', settings);
  drawSwitch();
  closeCard();
  for (const one of path(current)) nodes.get(one)?.update();
  follow();
  say(`Probabilities ${settings.xray ? 'on' : 'off'}`);
}
const drawSwitch = () => { $('xray').ariaPressed = String(Boolean(settings.xray)); };
document.body.append(card);
$('xray').onclick = toggleXray;
drawSwitch();
