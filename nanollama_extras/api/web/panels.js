'use strict';
// What stands beside a conversation: the welcome, models, settings, the prompt view, help, menus.
const FIRST_MODEL = 'smollm2';
const IDEAS = ['Explain how rainbows form', 'Write a haiku about the sea',
  'Show me quicksort in Python', 'Name my pet llama'];
const PRESETS = {
  Concise: 'Answer in as few words as possible.',
  Teacher: 'You are a patient teacher. Explain step by step, with one example.',
  Programmer: 'You are an expert programmer. Answer with code first, then a short explanation.',
  Editor: 'Correct the spelling, grammar and style of each text. Answer with the corrected text.',
  Translator: 'Translate each message into English; translate English into German.'};

// ---- welcome and models ------------------------------------------------------------------------
const modelList = el('section', {className: 'models', ariaLabel: 'Models'});
function welcome() {
  const node = el('div', {className: 'welcome'});
  node.append($('drawer').querySelector('.brand').cloneNode(true));
  if (trouble === NO_MODEL) {
    node.append(el('h2', {}, 'Welcome to nanollama'),
      el('p', {}, 'There is no model on this machine yet. Download one to begin.'), modelList);
    return node;
  }
  node.append(el('h2', {}, 'What is on your mind?'));
  const ideas = IDEAS.map((idea) => button(idea, () => { input.value = idea; input.focus(); }));
  node.append(el('div', {className: 'ideas'}, ...ideas));
  if (!touch.matches) node.append(el('p', {}, 'Enter sends, Shift+Enter is a new line, ? helps.'));
  return node;
}
function drawModels() {
  if (!current) return;
  const isFirst = !models.length, greeting = log.querySelector('.welcome');
  if (greeting && greeting.contains(modelList) !== (trouble === NO_MODEL)) {
    greeting.replaceWith(welcome());
  }
  const {activeElement} = document, focused = modelList.contains(activeElement) && activeElement.name;
  if (download?.box?.isConnected && !download.error) return void downloadBox(download);
  const typed = modelList.querySelector('[name=reference]')?.value ?? '';
  modelList.replaceChildren(el('ul', {}, ...models.map(modelRow)),
    ...server ? [] : downloads(isFirst, typed));
  if (focused) [...modelList.querySelectorAll('[name]')].find(({name}) => name === focused)?.focus();
}
function modelRow({id, state, meta}) {
  const about = [meta?.n_params && `${(meta.n_params / 1e6).toLocaleString('en',
    {maximumSignificantDigits: 3})} M parameters`, meta?.size && bytes(meta.size),
  state && state !== 'unloaded' && state].filter(Boolean).join(' · ');
  const isChosen = model?.id === id;
  const choose = el('button', {type: 'button', name: `use-${id}`, className: 'model',
    ariaPressed: String(isChosen), onclick: () => { useModel(id); $('shelf').close(); ready(); }},
  icon(isChosen ? 'check' : 'models'), el('span', {}, el('b', {}, id), el('small', {}, about)));
  return el('li', {}, choose);
}
function downloadBox(own) {  // one node for a download, so that its button stays under the pointer
  own.box ??= el('div', {className: 'download'}, el('b', {}, `Downloading ${own.name}`),
    el('progress', {ariaLabel: `Download of ${own.name}`}), el('span'),
    button('Cancel', () => own.controller.abort(), 'plain'));
  const [, bar, text] = own.box.children, sizes = Object.values(own.files);
  const total = sizes.reduce((sum, [, all]) => sum + all, 0);
  const done = sizes.reduce((sum, [there]) => sum + there, 0);
  if (total) Object.assign(bar, {max: total, value: done});
  text.textContent = total
    ? `${bytes(done)} of ${bytes(total)} · ${Math.floor(done / total * 100)} %` : own.status;
  return own.box;
}
function downloads(isFirst, typed) {
  const {name, error} = download ?? {};
  if (download && !error) return [downloadBox(download)];
  const found = [];
  if (error) {
    const text = error.status === 403 ? error.message : `${name} was not downloaded: ${error.message}`;
    found.push(el('div', {className: 'error', role: 'alert'}, text));
  }
  const offer = iconText('import', `Download ${FIRST_MODEL}`, () => pull(FIRST_MODEL), 'primary');
  offer.name = 'first';
  offer.firstChild.classList.add('turned');
  if (isFirst) found.push(offer, el('p', {}, 'It is small (145 MB) and runs on any machine.'));
  const form = el('form', {className: 'pull'},
    el('input', {name: 'reference', value: typed, placeholder: 'owner/model from the hub',
      ariaLabel: 'Another model to download', autocomplete: 'off', spellcheck: false}),
    el('button', {className: 'plain'}, 'Download'));
  form.onsubmit = (event) => {
    event.preventDefault();
    const reference = form.elements.reference.value.trim();
    if (reference) pull(reference);
  };
  return [...found, form];
}

// ---- settings ----------------------------------------------------------------------------------
const dialog = $('settings'), form = dialog.firstElementChild, fields = form.elements;
function openSettings() {
  const values = settingsOf(current), served = model?.sampling ?? {};
  for (const name of FIELDS) {
    const field = fields[name], value = served[name];
    if (field.type === 'checkbox') field.checked = Boolean(values[name]);
    else field.value = values[name] ?? '';
    if (NUMBERS.includes(name)) {
      field.placeholder = value ?? {max_tokens: 'no limit', seed: 'random'}[name] ?? '';
    }
  }
  drawPresets();
  if (!dialog.open) dialog.showModal();
}
function change(name, value) {  // of this conversation
  current.settings = {...settingsOf(current), [name]: value};
  if (chats.has(current.id)) write(current);
}
function drawPresets() {
  const all = {...PRESETS, ...settings.presets}, text = fields.system.value;
  const name = Object.keys(all).find((one) => all[one] === text) ?? '';
  fields.preset.replaceChildren(el('option', {value: ''}, 'Presets…'),
    ...Object.keys(all).map((one) => el('option', {value: one}, one)));
  fields.preset.value = name;
  $('keep-preset').disabled = Boolean(name) || !text.trim();
  $('drop-preset').hidden = !Object.hasOwn(Object(settings.presets), name);
}
function savePresets(presets) {
  settings.presets = presets;
  save('settings', settings);
  drawPresets();
}
form.oninput = ({target: {name, value, validity, checked, type}}) => {
  if (name === 'preset') {
    if (!value) return;
    fields.system.value = {...PRESETS, ...settings.presets}[value];
    change('system', fields.system.value);
  } else if (name === 'key' || name === 'remember') {
    if (fields.key.validity.valid) key = fields.key.value;
    save(keyName, key, 'sessionStorage');
    save(keyName, fields.remember.checked && key);
  } else if (name === 'server') {
    settings.server = value;
    save('settings', settings);
    useServer(value);
    showKey();
    connect();
  } else if (name === 'theme') {
    document.documentElement.dataset.theme = settings.theme = value;
    save('settings', settings);
  } else if (validity.valid) change(name, type === 'checkbox' ? (checked ? 'on' : '') : value);
  drawPresets();
};
$('keep-preset').onclick = () => {
  const text = fields.system.value, name = firstTitle(text).slice(0, 40);
  savePresets({...settings.presets, [name]: text});
};
$('drop-preset').onclick = () => {
  const {[fields.preset.value]: gone, ...rest} = settings.presets;
  savePresets(rest);
};
$('defaults').onclick = () => {
  const {system} = settingsOf(current);
  current.settings = {...system && {system}};
  if (chats.has(current.id)) write(current);
  openSettings();
};
$('for-new').onclick = () => {
  for (const name of FIELDS) settings[name] = settingsOf(current)[name] ?? '';
  save('settings', settings);
  toast('New chats begin with these settings.');
};
form.onsubmit = (event) => { event.preventDefault(); dialog.close(); };
fields.key.onchange = connect;
function showKey() {
  fields.key.value = key;
  fields.remember.checked = load(keyName);
}
function askKey(why = '') {
  $('refused').textContent = why;
  openSettings();
  fields.key.focus();
}

// ---- the prompt --------------------------------------------------------------------------------
async function showPrompt(chat, message = null) {  // of an answer, or of the next one
  const values = message?.settings ?? settingsOf(chat);
  const said = path(chat, message ? parentOf(chat, chat.messages.indexOf(message)) : endOf(chat));
  const draft = {role: 'user', content: input.value, files: attached};
  if (!message && (draft.content.trim() || attached.length)) said.push(draft);
  const request = requestOf(values, said), {tools} = await lent;
  if (message?.model) request.model = message.model;
  if (tools?.length) request.tools = tools;
  Object.assign($('prompt'), {model: request.model});
  $('prompt-text').tokens = null;
  $('prompt-about').textContent = 'Asking the server…';
  $('prompt-text').replaceChildren();
  $('prompt').showModal();
  try {
    if (!request.messages.length) throw Error('Nothing has been said yet.');
    const asked = await post('tokenize', {...request, with_pieces: true});
    const {tokens, count: number} = await asked.json();
    const fields = Object.entries(sampling(values)).map(([name, x]) => `${name} ${JSON.stringify(x)}`);
    $('prompt-about').textContent = [count(number, 'token'), request.model, ...fields].join(' · ');
    $('prompt-text').replaceChildren(...tokens.slice(0, 20_000).map(tokenBox));
    shadePrompt();
  } catch (error) {
    const more = request.messages.length ? ' This is what is sent:' : '';
    $('prompt-about').textContent = `${error.message}${more}`;
    const short = (_, value) => (value?.length > 200 && isImageUrl(value) ? `${value.slice(0, 30)}…` : value);
    if (more) $('prompt-text').replaceChildren(JSON.stringify(request, short, 1));
  }
}
function tokenBox({id, piece}) {
  const node = el('span', {title: `token ${id}`}, piece.replace(/\n/g, '⏎\n') || '·');
  Object.assign(node.dataset, {id, piece});
  return node;
}
$('with-ids').onchange = ({target}) => { $('prompt-text').classList.toggle('ids', target.checked); };
$('inspect').onclick = () => showPrompt(current);

// ---- files to send -----------------------------------------------------------------------------
const MAX_FILE = 1_000_000;  // bytes
let attached = [];  // {name, text, tokens, exact}, or an image
async function attach(files) {
  for (const file of files) {
    if (isPicture(file)) { await attachImage(file); continue; }
    const text = file.size <= MAX_FILE ? (await file.text()).replace(/\r\n/g, '\n') : null;
    if (text === null) toast(`${file.name} is larger than ${bytes(MAX_FILE)}.`);
    else if (/[\0\uFFFD]/.test(text)) toast(`${file.name} is not a text file.`);
    else {
      const one = {name: file.name, text};
      attached.push(one);
      drawFiles();
      Object.assign(one, await numTokens(fenced(one)));
      drawFiles();
    }
  }
  input.focus();
}
function drawFiles() {
  const list = $('files'), all = attached.reduce((sum, {tokens}) => sum + (tokens ?? 0), 0);
  const free = (model?.max_model_len ?? Infinity) - usedOf(current);
  list.hidden = !attached.length;
  list.replaceChildren(...attached.map((one) => {
    const size = one.problem ?? (one.tokens === undefined ? 'counting…'
      : (one.exact ? '' : '≈ ') + count(one.tokens, 'token'));
    const mark = one.small ? el('img', {src: one.small, alt: ''}) : icon('file');
    const drop = iconButton('close', `Remove ${one.name}`, () => {
      attached = attached.filter((other) => other !== one);
      drawFiles();
      input.focus();
    });
    return el('li', {className: one.problem ? 'over' : ''}, mark,
      el('span', {}, one.name, el('small', {}, size)), drop);
  }));
  if (all > free) {
    const room = count(Math.max(free, 0), 'token');
    const text = `Too long: the context has room for ${room}.`;
    list.append(el('li', {className: 'over'}, el('span', {role: 'alert'}, text)));
  }
}

// ---- menus and help ----------------------------------------------------------------------------
function rename(chat) {
  const link = $(`open-${chat.id}`), box = el('input', {value: chat.title, ariaLabel: 'New title',
    maxLength: 200, className: 'rename'});
  let isDone = false;
  const end = (keeps) => {
    if (isDone) return;
    isDone = true;
    if (keeps && box.value.trim()) chat.title = box.value.trim();
    box.replaceWith(link);
    keep(chat);
    if (chat === current) $('title').value = chat.title;
    $(`open-${chat.id}`)?.focus();
  };
  box.onblur = () => end(true);
  box.onkeydown = (event) => {
    if (event.isComposing) return;
    if (event.key === 'Escape' || event.key === 'Enter') {
      event.preventDefault();
      event.stopPropagation();
      end(event.key === 'Enter');
    }
  };
  link.replaceWith(box);
  box.select();
}
function openMenu(chat, opener, inList) {  // what can be done with a conversation
  const entry = (name, label, act) => el('button', {type: 'button', role: 'menuitem', tabIndex: -1,
    onclick: () => { $('menu').hidePopover(); act(); }}, icon(name), label);
  const toggle = () => { chat.pinned = !chat.pinned; keep(chat); };
  const retitle = () => { if (inList) rename(chat); else { $('title').focus(); $('title').select(); } };
  $('menu').replaceChildren(entry('edit', 'Rename', retitle),
    entry('pin', chat.pinned ? 'Unpin' : 'Pin', toggle),
    entry('export', 'Export as Markdown',
      () => saveFile(fileName(chat, 'md'), 'text/markdown', asMarkdown(chat))),
    entry('export', 'Export as JSON', () => exportJson([chat], fileName(chat, 'json'))),
    entry('trash', 'Delete', () => remove(chat)));
  const {bottom, right, top} = opener.getBoundingClientRect();
  $('menu').showPopover({source: opener});
  const {offsetWidth: width, offsetHeight: height} = $('menu');
  $('menu').style.left = `${Math.max(8, Math.min(right, innerWidth - 8) - width)}px`;
  $('menu').style.top = `${bottom + height + 8 > innerHeight ? Math.max(8, top - height) : bottom + 4}px`;
  $('menu').firstChild.focus();
  $('menu').opener = opener.id;
}
$('menu').onkeydown = (event) => {
  const all = [...$('menu').children], at = all.indexOf(document.activeElement);
  const next = {ArrowDown: at + 1, ArrowUp: at - 1 + all.length, Home: 0, End: all.length - 1}[event.key];
  if (event.key === 'Tab') $('menu').hidePopover();
  if (next === undefined) return;
  event.preventDefault();
  all[next % all.length].focus();
};
const SHORTCUTS = [['Enter', 'Send'], ['Shift Enter', 'New line'], ['Esc', 'Stop the answer, or close'],
  ['↑', 'Edit the last message (in an empty field)'], ['/', 'Go to the message field'],
  ['Ctrl Shift O', 'New chat'], ['Ctrl K', 'Search the conversations'], ['Ctrl ,', 'Settings'],
  ['Ctrl Shift P', 'The prompt and its tokens'], ['Ctrl Shift U', 'Attach files'],
  ['Ctrl Shift ;', 'Copy the last answer'],
  ['Ctrl Shift L', 'Probabilities of the tokens'], ['?  or  Ctrl /', 'This sheet']];
$('shortcuts').append(...SHORTCUTS.flatMap(([keys, use]) => [
  el('dt', {}, ...keys.split(' ').flatMap((one, i) => one === 'or' ? [' or '] : one
    ? [i ? ' ' : '', el('kbd', {}, one)] : [])), el('dd', {}, use)]));
