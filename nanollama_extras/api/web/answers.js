'use strict';
// Questions and answers: what is sent, what comes back, and the calls of tools between them.
const NUMBERS = ['temperature', 'top_p', 'top_k', 'min_p', 'max_tokens', 'seed', 'repeat_penalty',
  'repeat_last_n', 'presence_penalty', 'frequency_penalty', 'thinking_budget'];
const FIELDS = ['system', 'stop', 'logit_bias', 'reasoning_effort', 'ignore_eos', ...NUMBERS];
const pending = new Set();  // calls of tools that are running
const REFUSED = 'The user did not allow this call.';

const settingsOf = (chat) => chat.settings
  ?? Object.fromEntries(FIELDS.filter((name) => settings[name]).map((name) => [name, settings[name]]));
function sampling(values) {  // the fields of a request: those that were set
  const request = {}, {stop: words, logit_bias, reasoning_effort, ignore_eos} = values;
  for (const name of NUMBERS) if (values[name]) request[name] = Number(values[name]);
  if (words) request.stop = words.split('\n').filter(Boolean).map((word) => word.replace(/\\n/g, '\n'));
  const pairs = [...(logit_bias ?? '').matchAll(/(\d+)[\s:=]+(-?[\d.]+)/g)];
  if (pairs.length) request.logit_bias = Object.fromEntries(pairs.map(([, id, x]) => [id, Number(x)]));
  if (reasoning_effort) request.reasoning_effort = reasoning_effort;
  if (ignore_eos) request.ignore_eos = true;
  return request;
}
function fenced({name, text}) {
  const ticks = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length)) + 1;
  return `${name}:\n${'`'.repeat(ticks)}\n${text}\n${'`'.repeat(ticks)}`;
}
function asText({content, files = []}) {  // a message with its files as text; images are named
  const texts = files.map((one) => (one.small ? `[Image: ${one.name}]` : fenced(one)));
  return [...texts, content].filter(Boolean).join('\n\n');
}
function asSent({role, content, calls, files = []}) {  // the messages of a request for a message
  const images = files.filter(({small}) => small);
  content = asText({content, files: files.filter(({small}) => !small)});
  if (images.length) content = [...images.map(imagePart), ...content ? [{type: 'text', text: content}] : []];
  if (!calls) return content ? [{role, content}] : [];  // one that failed may have none
  const results = calls.map(({id, result}) =>
    ({role: 'tool', tool_call_id: id, content: result ?? REFUSED}));
  const tool_calls = calls.map(({id, name, arguments: text}) =>
    ({id, type: 'function', function: {name, arguments: text}}));
  return [{role, content, tool_calls}, ...results];
}
function requestOf(values, said) {
  const messages = said.flatMap(asSent);
  if (values.system?.trim()) messages.unshift({role: 'system', content: values.system});
  return {model: model?.id, messages, stream: true, stream_options: {include_usage: true},
    ...sampling(values)};
}

const stop = (chat) => runs.get(chat.id)?.controller.abort();
function ask(chat, content, files = [], parent = endOf(chat)) {
  chat.title ||= firstTitle(content || files[0].name);
  append(chat, {role: 'user', content, ...files.length && {files}}, parent);
  answer(chat);
}
function answerAgain(chat, message) {  // another version; one that holds nothing is replaced
  stop(chat);
  const index = chat.messages.indexOf(message), parent = parentOf(chat, index);
  const isEmpty = !message.content && !message.reasoning && !message.calls;
  if (isEmpty && index === chat.messages.length - 1) chat.messages.pop();
  answer(chat, parent);
}
async function answer(chat, parent = endOf(chat), message = null) {  // or goes on with a message
  stop(chat);
  const values = settingsOf(chat), isMore = Boolean(message);
  const end = isMore ? chat.messages.indexOf(message) : parent;
  const request = requestOf(values, path(chat, end));
  if (isMore) {
    Object.assign(request, {continue_final_message: true, add_generation_prompt: false});
    if (!message.content) {  // it was cut inside its thought
      const {reasoning: reasoning_content} = message;
      request.messages.push({role: 'assistant', content: '', reasoning_content});
    }
    Object.assign(message, {finish: undefined, error: undefined});
    message.reasoning ??= '';
    if (!settings.xray) delete message.tokens;
    else message.tokens ??= [[message.content, 0, null, []]];  // its tokens are not known
  } else message = append(chat, {role: 'assistant', content: '', reasoning: '', model: model?.id}, parent);
  message.settings = values;
  if (settings.xray) Object.assign(request, {logprobs: true, top_logprobs: NUM_OTHERS});
  const run = {chat, message, controller: new AbortController(), chunks: 0, cost: 0, saved: 0};
  run.signal = run.controller.signal;
  chat.updated = Date.now();
  runs.set(chat.id, run);
  history.replaceState(null, '', `#${chat.id}`);
  keep(chat);
  show();
  ready();
  if (model?.state && model.state !== 'loaded') setTimeout(connect, 300);  // shows the loading
  try {
    const {tools, servers} = await lent;
    if (tools?.length) request.tools = tools;
    const response = await post('v1/chat/completions', request, run.signal);
    for await (const data of events(response.body)) {
      if (data === '[DONE]') break;
      take(run, JSON.parse(data));
      paintSoon(run);
    }
    if (!message.finish) throw Error('The connection was closed before the answer was complete.');
    for (const one of message.calls ?? []) one.server = servers?.[one.name];
  } catch (error) {
    if (error.name === 'AbortError') message.finish = 'stopped';
    else message.error = {text: error.message, status: error.status};
    if (message.error && !error.status) connect();
  }
  if (!message.error && model?.state !== 'loaded') connect();  // the answer has loaded the model
  if (runs.get(chat.id) === run) runs.delete(chat.id);
  if (chats.get(chat.id) === chat) keep(chat);
  paint(run);
}
async function decide(chat, message, one, allowed) {  // the user's word on a call
  if (pending.has(one) || runs.has(chat.id)) return;
  pending.add(one);
  paint({message});
  try {
    if (allowed) {
      const body = {name: one.name, arguments: JSON.parse(one.arguments || '{}')};
      one.result = (await (await post('tools/call', body)).json()).content;
    } else one.result = REFUSED;
  } catch (error) {
    one.result = `Error: ${error.message}`;
  }
  pending.delete(one);
  if (chats.get(chat.id) !== chat) return;
  keep(chat);
  paint({message});
  if (path(chat).at(-1) === message && message.calls.every(isDecided)) answer(chat);
}
const isDecided = ({result}) => result !== undefined;
function take(run, {error, choices: [choice] = [], usage, timings}) {
  if (error) throw Error(error.message);
  const {message} = run, delta = choice?.delta ?? {}, now = performance.now();
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? '', content = delta.content ?? '';
  if (reasoning + content) {
    const seconds = (now - (run.since ??= now)) / 1000;
    if (seconds > 1) message.note = `≈ ${(run.chunks / seconds).toFixed(1)} tokens/s`;
    if (message.reasoning && content) message.thought ??= Math.ceil(seconds) || 1;
    run.chunks++;
  }
  message.reasoning += reasoning;
  message.content += content;
  for (const {index, id, function: {name, arguments: text} = {}} of delta.tool_calls ?? []) {
    const one = (message.calls ??= [])[index] ??= {id, name, arguments: ''};
    one.arguments += text ?? '';
  }
  if (choice?.logprobs?.content) takeTokens(run, choice.logprobs.content);
  message.finish = choice?.finish_reason ?? message.finish;
  run.rate = timings?.predicted_per_second ?? run.rate;
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    message.used = usage.total_tokens;
    message.note = (run.rate ? `${run.rate.toFixed(1)} tokens/s · ` : '')
      + `${usage.completion_tokens} tokens · prompt ${usage.prompt_tokens}`
      + (cached ? ` (${cached} cached)` : '');
  }
}
