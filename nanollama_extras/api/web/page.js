'use strict';
// The frame of the page: the list of conversations, the composer, keys, and the start.
const usedOf = (chat) => path(chat).findLast((message) => message.used)?.used ?? 0;
function refresh() {  // what surrounds the messages
  const running = runs.has(current.id), label = running ? 'Stop (Esc)' : 'Send (Enter)';
  const used = usedOf(current), size = model?.max_model_len, isLoading = model?.state === 'loading';
  if ($('send').ariaLabel !== label) {
    Object.assign($('send'), {title: label, ariaLabel: label});
    $('send').replaceChildren(icon(running ? 'stop' : 'send'));
  }
  Object.assign($('context'), {hidden: !size, max: size ?? 1, value: used});
  $('loading').hidden = !isLoading;
  if (isLoading && lastLoad()) $('loading').value = Math.min(0.95, (Date.now() - since) / lastLoad());
  else $('loading').removeAttribute('value');
  $('pick').hidden = models.length < 2;
  const ids = models.map(({id}) => id);
  if (`${[...$('pick').options].map((one) => one.value)}` !== `${ids}`) {
    $('pick').replaceChildren(...ids.map((id) => el('option', {}, id)));
  }
  if (model) $('pick').value = model.id;
  $('model').textContent = [$('pick').hidden && model?.id, trouble].filter(Boolean).join(' · ');
  $('used').textContent = used.toLocaleString('en')
    + (size ? ` of ${size.toLocaleString('en')} tokens` : ' tokens');
  document.title = (current.title ? `${current.title} · ` : '') + 'nanollama';
  $('more').hidden = !chats.has(current.id);
  drawList();
}
const DAY = 86_400_000;
function ageOf({pinned, updated}) {  // the heading that a conversation stands under
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - updated) / DAY);
  return pinned ? 'Pinned' : days < 1 ? 'Today' : days < 2 ? 'Yesterday' : days < 8 ? 'Last 7 days'
    : days < 31 ? 'Last 30 days' : 'Older';
}
function excerpt(chat, words) {  // what surrounds the words that were searched for
  const text = chat.messages.map(({content}) => content).find((one) => one.toLowerCase().includes(words));
  const at = text?.toLowerCase().indexOf(words) ?? 0;
  return text && (at > 20 ? '…' : '') + text.slice(Math.max(0, at - 20), at + 80);
}
function drawList() {
  if ($('chats').querySelector('.rename')) return;  // until the new title is there
  const words = $('search').value.trim().toLowerCase(), focused = document.activeElement.id;
  const newest = [...chats.values()].sort((a, b) => b.updated - a.updated);
  const found = newest.filter((chat) => !words || titleOf(chat).toLowerCase().includes(words)
    || excerpt(chat, words));
  const groups = new Map(found.some(({pinned}) => pinned) ? [['Pinned', []]] : []);
  for (const chat of found) {
    const age = ageOf(chat);
    groups.set(age, [...groups.get(age) ?? [], chat]);
  }
  const empty = words ? 'Nothing found.' : 'Conversations stay in this browser.';
  $('chats').replaceChildren(...found.length ? [] : [el('p', {}, empty)],
    ...[...groups].flatMap(([age, list]) => [el('h2', {}, age),
      el('ul', {}, ...list.map((chat) => entryOf(chat, words)))]));
  if (focused) $(focused)?.focus();
}
function entryOf(chat, words) {
  const title = titleOf(chat), link = el('a', {id: `open-${chat.id}`, href: `#${chat.id}`, title,
    className: runs.has(chat.id) ? 'live' : ''}, title);
  if (chat === current) link.ariaCurrent = 'page';
  if (words && !title.toLowerCase().includes(words)) link.append(el('small', {}, excerpt(chat, words)));
  const more = iconButton('more', `Options for ${title}`, () => openMenu(chat, more, true));
  Object.assign(more, {id: `more-${chat.id}`, ariaHasPopup: 'menu'});
  return el('li', {}, link, more);
}
function go() {  // to the conversation that the address names
  current = chats.get(location.hash.slice(1)) ?? newChat();
  if ($('drawer').matches(':popover-open')) $('drawer').hidePopover();
  show();
  ready();
}

// ---- wiring ------------------------------------------------------------------------------------
function sends(event) {  // 229: an input method took the key (Safari)
  const yes = event.key === 'Enter' && !event.shiftKey && !touch.matches && !event.isComposing
    && event.keyCode !== 229;
  if (yes) event.preventDefault();
  return yes;
}
log.onscroll = () => {
  $('down').hidden = atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 8;
};
new ResizeObserver(follow).observe(log);
$('down').onclick = () => { atEnd = true; follow(); };
$('new').onclick = (event) => {
  if (!location.hash.slice(1)) { event.preventDefault(); go(); }
};
$('title').onchange = ({target}) => {
  current.title = target.value.trim();
  if (chats.has(current.id)) keep(current);
};
$('search').oninput = drawList;
$('search').onkeydown = (event) => {
  if (event.key === 'Enter') $('chats').querySelector('a')?.click();
  if (event.key === 'ArrowDown') { event.preventDefault(); $('chats').querySelector('a')?.focus(); }
};
$('chats').onkeydown = (event) => {  // arrows go through the list
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key], all = [...$('chats').querySelectorAll('a')];
  const at = all.indexOf(document.activeElement);
  if (!step || at < 0) return;
  event.preventDefault();
  (all[at + step] ?? (step < 0 ? $('search') : all[at])).focus();
};
$('more').onclick = () => openMenu(current, $('more'), false);
$('models').onclick = () => { $('shelf').append(modelList); drawModels(); $('shelf').showModal(); };
$('import').onclick = () => $('imported').click();
$('imported').onchange = ({target}) => {
  importFiles([...target.files]);
  target.value = '';
};
$('export').onclick = () => exportJson([...chats.values()], 'nanollama-chats.json');
$('keys').onclick = () => $('help').showModal();
$('attach').onclick = () => $('picked').click();
$('shoot').onclick = () => (touch.matches ? $('shot').click() : openCamera());
$('shoot').hidden = !touch.matches;  // elsewhere, a browser would show the dialog for files
navigator.mediaDevices?.enumerateDevices().then((all) => {  // https and this machine alone have them
  if (all.some(({kind}) => kind === 'videoinput')) $('shoot').hidden = false;
});
$('picked').onchange = $('shot').onchange = ({target}) => {
  attach([...target.files]);
  target.value = '';
};
$('composer').onsubmit = (event) => {
  event.preventDefault();
  const text = input.value, files = attached;
  if (runs.has(current.id)) return stop(current);
  if (!text.trim() && !files.length) return;
  for (const one of files) { delete one.exact; delete one.problem; }
  input.value = '';
  attached = [];
  drawFiles();
  ask(current, text, files);
};
input.onkeydown = (event) => {
  if (event.key === 'ArrowUp' && !input.value) {
    [...log.querySelectorAll('.user [aria-label=Edit]')].at(-1)?.click();
  }
  if (sends(event) && !runs.has(current.id)) $('composer').requestSubmit();
};
input.onpaste = (event) => {
  const {files} = event.clipboardData;
  if (files.length) { event.preventDefault(); attach([...files]); }
};
ondragover = (event) => { if (event.dataTransfer.types.includes('Files')) event.preventDefault(); };
ondrop = (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  attach([...event.dataTransfer.files]);
};
const COMMANDS = {  // of the keys with Ctrl, or ⌘
  k: () => {
    if (getComputedStyle($('drawer')).display === 'none') $('drawer').showPopover();
    $('search').focus();
  },
  ',': openSettings, '/': () => $('keys').click(),
  'shift+o': () => { $('new').click(); }, 'shift+p': () => showPrompt(current),
  'shift+u': () => $('attach').click(), 'shift+l': () => $('xray').click(),
  'shift+;': () => [...log.querySelectorAll('.assistant [aria-label=Copy]')].at(-1)?.click()};
COMMANDS['shift+:'] = COMMANDS['shift+;'];
document.onkeydown = (event) => {
  const {key: name, isComposing, target} = event;
  const busy = isComposing || document.querySelector('dialog[open], #drawer:popover-open, #menu:popover-open');
  if (busy) return;
  const isWriting = target.matches('input, textarea, select');
  if (name === 'Escape') stop(current);
  const command = (event.ctrlKey || event.metaKey) && !event.altKey
    && COMMANDS[(event.shiftKey ? 'shift+' : '') + name.toLowerCase()];
  const plain = !isWriting && !event.ctrlKey && !event.metaKey && !event.altKey
    && {'?': COMMANDS['/'], '/': () => input.focus()}[name];
  if (!command && !plain) return;
  event.preventDefault();
  (command || plain)();
};
$('configure').onclick = openSettings;
for (const one of document.querySelectorAll('dialog')) {
  one.onclick = ({target}) => { if (target === one) one.close(); };
}
$('shelf').onclose = () => drawModels();
$('pick').onchange = ({target}) => useModel(target.value);
showKey();
$('servers').hidden = !servers.length;
fields.server.append(...servers.map((url) => el('option', {}, url)));
fields.server.value = server;
fields.theme.value = document.documentElement.dataset.theme = settings.theme ?? '';

onbeforeunload = onpagehide = () => { runs.forEach(({chat}) => { stop(chat); write(chat); }); };
onhashchange = go;
onstorage = ({key: name}) => {  // another tab wrote
  read(name);
  if (name === `nanollama.chat.${current.id}`) go();
  else refresh();
};
matchMedia('(width >= 50rem)').onchange = () => $('drawer').hidePopover();
try { Object.keys(localStorage).forEach(read); } catch { /* blocked storage holds nothing */ }
go();
connect();
