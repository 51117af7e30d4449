'use strict';
// The server: requests, its models, downloads, and what its errors mean.
// Only v1/models and v1/chat/completions are needed; a server without the rest offers less.
const settings = {...Object(load('settings'))};  // of this browser, and the start of new chats
// Servers that --page-server allows beside this page's own, which is ''; each has a key of its own
const servers = document.documentElement.dataset.servers?.split(' ') ?? [];
let server, keyName, key;
function useServer(url) {
  server = servers.includes(url) ? url : '';
  keyName = server ? `key ${server}` : 'key';
  key = load(keyName, 'sessionStorage') ?? load(keyName) ?? '';
}
useServer(settings.server);
const NO_MODEL = 'no model here yet';
let models = [], model = null, trouble = 'Connecting…', reconnect, since = 0;

function lost(error) {
  throw error.name === 'AbortError' ? error
    : Error('No connection: the server has stopped, or the network is down.');
}
async function call(path, options) {
  const headers = {'Content-Type': 'application/json', ...key && {Authorization: `Bearer ${key}`}};
  const response = await fetch(server ? `${server}/${path}` : path, {headers, ...options}).catch(lost);
  if (response.ok) return response;
  let message = (await response.text().catch(lost)).slice(0, 9999) || response.statusText;
  const wait = response.headers.get('retry-after');
  try {
    const {error} = JSON.parse(message);
    message = error.message ?? error;
  } catch { /* a proxy's own page */ }
  if (wait) message += ` Try again in ${wait} s.`;
  throw Object.assign(Error(message), {status: response.status});
}
const post = (path, body, signal) =>
  call(path, {method: 'POST', body: JSON.stringify(body), signal});
async function* pieces(body, separator) {  // a stream of text, cut at a separator
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ''; ;) {
    const {value, done} = await reader.read().catch(lost);
    if (done) return;
    const parts = (buffer + value).split(separator);
    buffer = parts.pop();
    yield* parts;
  }
}
async function* events(body) {  // the data of each server-sent event
  for await (const part of pieces(body, /(?:\r\n|\n|\r(?!\n)){2}/)) {
    const lines = part.split(/[\r\n]+/).filter((line) => line.startsWith('data:'));
    if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, '')).join('\n');
  }
}
// What went wrong, for a person: the words for a status; the server's own text follows them.
const WORDS = {
  400: 'The server cannot take this message', 401: 'This server needs its API key',
  403: 'The server does not allow this', 404: 'The server does not have this',
  408: 'The message took too long to arrive', 413: 'The message is too large',
  429: 'The server is busy', 500: 'Something failed in the server',
  501: 'A part of the server is not installed', 502: 'The server cannot be reached',
  503: 'The server is not ready yet', 504: 'The server did not answer in time'};
const isTooLong = ({status, text}) => status === 400 && /context|too long|tokens? (fit|long)/i.test(text);
function inWords(error) {
  if (isTooLong(error)) return 'The conversation is longer than the model can read';
  return error.status ? WORDS[error.status] ?? 'The server refused' : 'Something went wrong';
}
// The tools that the server lends to its page, if it lends any: {tools, servers: {name: server}}
let lent = Promise.resolve({});
async function askForTools() {
  try {
    return await (await call('tools')).json();
  } catch (error) {
    if (error.status !== 403) console.warn(error);  // 403: a browser of another machine
    return {};
  }
}
async function connect() {
  clearTimeout(reconnect);
  try {
    models = (await (await call('v1/models')).json()).data;
    model = models.find(({id}) => id === settings.model) ?? models[0] ?? null;
    lent = 'tools' in document.documentElement.dataset && !server ? askForTools() : Promise.resolve({});
    const isLoading = model?.state === 'loading';
    noteLoading(isLoading);
    trouble = !model ? NO_MODEL : isLoading ? loadingText() : '';
    if (isLoading) reconnect = setTimeout(connect, 700);
    else if (trouble) reconnect = setTimeout(connect, 2000);
  } catch (error) {
    trouble = error.message;
    if (error.status === 401) askKey(trouble);
    else reconnect = setTimeout(connect, 5000);
  }
  drawModels();
  refresh();
}
function noteLoading(isLoading) {  // how long a model took the last time tells how far it is now
  if (since && model?.state === 'loaded') {
    settings.loads = {...settings.loads, [model.id]: Date.now() - since};
    save('settings', settings);
  }
  since = isLoading ? since || Date.now() : 0;
}
const lastLoad = () => Number(Object(settings.loads)[model.id]) || 0;  // milliseconds
function loadingText() {
  const seconds = Math.round((Date.now() - since) / 1000), size = model.meta?.size;
  const last = Math.round(lastLoad() / 1000), elapsed = seconds + (last > 1 ? ` of about ${last}` : '');
  return ['loading…', size && bytes(size), seconds > 0 && `${elapsed} s`].filter(Boolean).join(' · ');
}
function useModel(id) {
  settings.model = id;
  save('settings', settings);
  connect();
}
// ---- downloads ---------------------------------------------------------------------------------
let download = null;  // {name, status, files: {name: [done, total]}, error, controller}
async function pull(name) {
  const own = download = {name, status: 'starting', files: {}, controller: new AbortController()};
  drawModels();
  try {
    const {body} = await post('api/pull', {model: name, stream: true}, own.controller.signal);
    for await (const line of pieces(body, '\n')) {
      const {error, status, digest, total, completed} = line.trim() ? JSON.parse(line) : {};
      if (error) throw Error(error.message ?? error);
      if (digest && total) own.files[digest] = [completed ?? 0, total];
      own.status = status ?? own.status;
      drawModels();
    }
    if (own.status !== 'success') throw Error('The connection was closed before the end.');
    download = null;
    settings.model = name;
    save('settings', settings);
    await connect();
    say(`${name} is here.`);
    $('shelf').close();
    ready();
  } catch (error) {
    download = error.name === 'AbortError' ? null : Object.assign(own, {error});
  }
  drawModels();
}
async function numTokens(content) {  // {count, exact}
  try {
    const {count: number} = await (await post('tokenize', {model: model?.id, content})).json();
    if (Number.isInteger(number)) return {tokens: number, exact: true};
  } catch { /* another server, or no model yet */ }
  return {tokens: Math.ceil(content.length / 4), exact: false};
}
