'use strict';
// Conversations in this browser's storage: {id, title, updated, pinned, settings, at, messages}.
// `messages` is a tree in the order of its making: `parent` is the index of the message that one
// answers (the one before it, where it is absent; -1: none), `at` the end of the branch on view.
const chats = new Map(), runs = new Map();  // by id; a run is an answer that is being written
let current;

const isText = (text) => typeof text === 'string';
const isTexts = (values) => Object.values(Object(values)).every(isText);
const isCall = (one) => [one?.id, one?.name, one?.arguments, one?.server ?? '', one?.result ?? '']
  .every(isText);
const isFile = (file) => isText(file?.name) && (isText(file.text) || isImageUrl(file.small)
  && (file.image === undefined || isImageUrl(file.image)));
const areAll = (list, test) => list === undefined || Array.isArray(list) && list.every(test);
const isSound = ({id, title, updated, messages, at = 0, settings}) => isText(id) && isText(title)
  && typeof (updated ?? 0) === 'number' && Number.isInteger(at) && isTexts(settings)
  && Array.isArray(messages) && messages.every((message, i) => isText(message?.content)
    && isText(message.role) && isText(message.reasoning ?? '')
    && areAll(message.calls, isCall) && isTexts(message.settings)
    && areAll(message.tokens, isToken) && isText(message.name ?? '')
    && areAll(message.files, isFile)
    && Number.isInteger(message.parent ?? -1) && (message.parent ?? -1) < i);

function read(name) {  // an item of the storage; what is being written here goes before it
  const id = name?.split('nanollama.chat.')[1], chat = id && load(`chat.${id}`);
  if (runs.has(id)) return;
  chats.delete(id);
  const whole = {title: '', updated: 0, ...chat};
  if (whole.id === id && isSound(whole)) chats.set(id, whole);
}
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 6);
const newChat = () => ({id: newId(), title: '', updated: 0, messages: []});
const write = ({id}) => save(`chat.${id}`, chats.get(id));
function keep(chat) {
  chats.set(chat.id, chat);
  write(chat);
  refresh();
}
function remove(chat) {
  stop(chat);
  chats.delete(chat.id);
  write(chat);
  if (chat === current) location.hash = '';
  refresh();
  ready();
  toast(`Deleted “${titleOf(chat)}”.`, 'Undo', () => {
    keep(chat);
    location.hash = chat.id;
  });
}
const titleOf = (chat) => chat.title || 'Untitled';
function firstTitle(text) {  // a text's first line; a long one ends after a word
  const line = text.trim().split('\n')[0].replace(/^#+\s+/, '').trim();
  return line.length <= 100 ? line : `${line.slice(0, 99).replace(/\s+\S*$/, '')}…`;
}

// ---- branches ----------------------------------------------------------------------------------
const parentOf = (chat, index) => chat.messages[index].parent ?? index - 1;
const endOf = (chat) => Math.min(chat.at ?? Infinity, chat.messages.length - 1);
function path(chat, end = endOf(chat)) {  // the messages of a branch up to an index
  const found = [];
  for (let at = end; at >= 0; at = parentOf(chat, at)) found.push(chat.messages[at]);
  return found.reverse();
}
function append(chat, message, parent = endOf(chat)) {
  chat.messages.push(Object.assign(message, {parent}));
  chat.at = chat.messages.length - 1;
  return message;
}
function versions(chat, message) {  // the messages with the same parent
  const parent = parentOf(chat, chat.messages.indexOf(message));
  return chat.messages.filter((_, i) => parentOf(chat, i) === parent);
}
function choose(chat, message) {  // view the branch of a message, to its newest end
  let at = chat.messages.indexOf(message), next = at;
  for (; next >= 0; next = chat.messages.findLastIndex((_, i) => parentOf(chat, i) === at)) {
    at = next;
  }
  chat.at = at;
  keep(chat);
  show();
}

// ---- files -------------------------------------------------------------------------------------
const fileName = (chat, ending) =>
  `${titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 60).replace(/^-|-$/g, '')}.${ending}`;
function exportJson(list, name) {
  saveFile(name, 'application/json', `${JSON.stringify({nanollama: 1, chats: list}, null, 1)}\n`);
}
const MARK = /^<!-- nanollama: (system|user|assistant) -->$/m;
function asMarkdown(chat) {  // the branch on view
  const {system} = settingsOf(chat), said = path(chat).filter((message) => asText(message));
  const parts = said.map((message) => [message.role, asText(message)]);
  if (system?.trim()) parts.unshift(['system', system]);
  const names = {system: 'System', user: 'You', assistant: 'Answer'};
  return [`# ${titleOf(chat)}\n`, ...parts.map(([role, text]) =>
    `<!-- nanollama: ${role} -->\n## ${names[role]}\n\n${text}\n`)].join('\n');
}
function fromMarkdown(text) {
  const [head, ...rest] = text.replace(/\r\n/g, '\n').split(MARK), chat = newChat();
  chat.title = /^# (.*)$/m.exec(head)?.[1] ?? '';
  for (let i = 0; i < rest.length; i += 2) {
    const content = rest[i + 1].replace(/^\n## \w+\n\n/, '').trim();
    if (rest[i] === 'system') chat.settings = {system: content};
    else append(chat, {role: rest[i], content, finish: 'stop'});
  }
  return chat;
}
function fromFile(text) {  // the conversations in a file
  let found;
  try { found = JSON.parse(text); } catch { found = fromMarkdown(text); }
  const list = Array.isArray(found) ? found : found?.chats ?? [found];
  const sound = Array.isArray(list) ? list.filter((chat) => chat && isSound(
    {id: '', title: '', ...chat}) && chat.messages.length) : [];
  if (!sound.length) throw Error('it holds no conversation of this page (JSON or Markdown).');
  return sound.map((chat) => ({title: '', updated: Date.now(), ...chat, id: newId()}));
}
async function importFiles(files) {
  let last = null, number = 0;
  for (const file of files) {
    try {
      for (const chat of fromFile(await file.text())) { keep(last = chat); number++; }
    } catch (error) { return toast(`${file.name} was not imported: ${error.message}`); }
  }
  if (last) location.hash = last.id;
  toast(`Imported ${count(number, 'conversation')}.`);
}
