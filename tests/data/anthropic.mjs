// What the npm package @anthropic-ai/sdk does with our answers, which
// tests/extras/api/test_npm_clients.py scripts in this order. Usage: node anthropic.mjs URL
import assert from 'node:assert/strict';
import Anthropic from '@anthropic-ai/sdk';
import { betaTool } from '@anthropic-ai/sdk/helpers/beta/json-schema';

const [baseURL] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey: 'any', maxRetries: 0 });
const messages = [{ role: 'user', content: 'How is it in Bern?' }];
const inputSchema = {
  type: 'object', properties: { city: { type: 'string' } }, required: ['city'],
};
const tools = [{ name: 'get_weather', description: 'The weather', input_schema: inputSchema }];
const request = { model: 'any', max_tokens: 99, messages };
const input = { city: 'Bern' };

const texts = [];
const told = client.messages.stream(request).on('text', (text) => texts.push(text));
assert.equal(await told.finalText(), 'Sunny in Bern.');
assert.ok(texts.length > 1);
assert.equal(texts.join(''), 'Sunny in Bern.');

const parts = [];
const calling = client.messages.stream({ ...request, tools })
  .on('inputJson', (part) => parts.push(part));
const { content, stop_reason } = await calling.finalMessage();
assert.deepEqual(content.map((block) => block.type), ['text', 'tool_use']);
assert.deepEqual(content[1].input, input);
assert.deepEqual(JSON.parse(parts.join('')), input);
assert.equal(stop_reason, 'tool_use');

for (const stream of [false, true]) {
  const asked = [];
  const run = ({ city }) => { asked.push(city); return `${city}: sunny`; };
  const weather = betaTool({ name: 'get_weather', description: 'The weather', inputSchema, run });
  const runner = client.beta.messages.toolRunner({ ...request, tools: [weather], stream });
  const final = await runner.runUntilDone();
  assert.deepEqual(asked, ['Bern']);
  assert.deepEqual(final.content.map((block) => block.text), ['Bern is sunny.']);
}

const short = await client.messages.countTokens({ model: 'any', messages });
const long = await client.messages.countTokens({ model: 'any', messages, tools });
assert.ok(0 < short.input_tokens && short.input_tokens < long.input_tokens);

await assert.rejects(client.messages.create(request), Anthropic.RateLimitError);
await assert.rejects(client.messages.stream(request).finalMessage(), Anthropic.InternalServerError);
await assert.rejects(client.messages.create({ ...request, max_tokens: 0 }), (error) =>
  error instanceof Anthropic.BadRequestError && error.error.error.type === 'invalid_request_error'
    && error.requestID.length > 0);

console.log('all good');
