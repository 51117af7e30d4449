'use strict';
// Nodes, icons, buttons, and what this browser stores.
// What a model writes reaches the document as text nodes only: nothing on this page parses HTML.
const $ = (id) => document.getElementById(id);
function el(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}
const SVG = 'http://www.w3.org/2000/svg';
function icon(name) {
  const node = document.createElementNS(SVG, 'svg'), use = document.createElementNS(SVG, 'use');
  node.setAttribute('class', 'icon');
  node.setAttribute('aria-hidden', 'true');
  use.setAttribute('href', `#i-${name}`);
  node.append(use);
  return node;
}
const button = (label, onclick, className = '', ariaLabel = label) =>
  el('button', {type: 'button', className, ariaLabel, onclick}, label);
const iconButton = (name, label, onclick, className = '') => el('button',
  {type: 'button', className: `square ${className}`, ariaLabel: label, title: label, onclick},
  icon(name));
const iconText = (name, label, onclick, className = '') =>
  el('button', {type: 'button', className, onclick}, icon(name), label);
const say = (text) => { $('spoken').append(el('p', {}, text)); };

function copyButton(label, text) {
  const node = iconButton('copy', label, async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {  // plain http from another machine has no clipboard API
      const area = document.body.appendChild(el('textarea', {value: text(), className: 'sr'}));
      area.select();
      document.execCommand('copy');
      area.remove();
      node.focus();
    }
    say('Copied');
    node.replaceChildren(icon('check'));
    setTimeout(() => { node.replaceChildren(icon('copy')); }, 1500);
  });
  return node;
}
let toasts = 0;
function toast(text, label, action) {  // a message at the foot of the page, with one way back
  const number = ++toasts, hide = () => { if (number === toasts) $('toast').hidePopover(); };
  $('toast').replaceChildren(el('span', {}, text));
  if (action) $('toast').append(button(label, () => { hide(); action(); }));
  $('toast').hidePopover();
  $('toast').showPopover();
  setTimeout(hide, 10_000);
}
function saveFile(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], {type}));
  el('a', {href, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
const count = (number, word) => `${number.toLocaleString('en')} ${word}${number === 1 ? '' : 's'}`;
function bytes(number) {
  const unit = number < 1e6 ? 'KB' : number < 1e9 ? 'MB' : 'GB';
  const value = number / {KB: 1e3, MB: 1e6, GB: 1e9}[unit];
  return `${value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
}
// A browser may refuse to store (private, full, blocked), and what is there may be anything.
function load(name, area = 'localStorage') {
  try { return JSON.parse(window[area].getItem(`nanollama.${name}`)); } catch { return null; }
}
function save(name, value, area = 'localStorage') {
  try {
    if (value) window[area].setItem(`nanollama.${name}`, JSON.stringify(value));
    else window[area].removeItem(`nanollama.${name}`);
  } catch {
    trouble = 'The browser refuses to store more: what is new is lost with this tab.';
  }
}
