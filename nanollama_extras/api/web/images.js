'use strict';
// Images that are sent: read, shown small, and kept in this browser's storage only if they are small.
// An attached image is {name, image, small}: two data: URLs. Without `image`, it was too large to keep.
const SENT_AS_IS = ['image/png', 'image/jpeg', 'image/webp', 'image/gif'];
const MAX_IMAGE = 20_000_000, KEPT = 200_000;  // bytes of a file; characters of a URL in the storage
const SMALL = 320, LARGE = 2048;  // pixels of the longer side: shown, and of other formats when sent
const whole = new WeakMap();  // an image that is too large to keep -> its URL, while the page is open

const isPicture = ({type}) => type.startsWith('image/') && type !== 'image/svg+xml';
const isImageUrl = (text) => /^data:image\/(png|jpeg|webp|gif);base64,[\w+/=]*$/.test(text);
const urlOf = (file) => file.image ?? whole.get(file);
function readUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    Object.assign(reader, {onload: () => resolve(reader.result), onerror: () => reject(reader.error)});
    reader.readAsDataURL(file);
  });
}
function drawn(bitmap, side) {  // the image as a JPEG whose longer side has at most so many pixels
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = el('canvas', {width: Math.max(1, bitmap.width * scale),
    height: Math.max(1, bitmap.height * scale)});
  const pen = canvas.getContext('2d');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/jpeg', 0.85);
}
async function readImage(file) {  // the entry of an image to send
  const bitmap = await createImageBitmap(file);
  const url = SENT_AS_IS.includes(file.type) ? await readUrl(file) : drawn(bitmap, LARGE);
  const one = {name: file.name, small: drawn(bitmap, SMALL)};
  bitmap.close();
  if (url.length <= KEPT) one.image = url;
  else whole.set(one, url);
  return one;
}
async function attachImage(file) {
  if (file.size > MAX_IMAGE) return toast(`${file.name} is larger than ${bytes(MAX_IMAGE)}.`);
  let one;
  try { one = await readImage(file); } catch { return toast(`${file.name} cannot be read as an image.`); }
  attached.push(one);
  drawFiles();
  try {
    Object.assign(one, {tokens: await imageTokens(one), exact: true});
  } catch (error) { one.problem = error.status === 400 ? error.message : ''; }
  drawFiles();
}
const video = document.querySelector('#camera video');  // of a computer; a phone has a dialog of its own
async function openCamera() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {width: {ideal: LARGE}}});
  } catch ({name}) {
    return toast(name === 'NotAllowedError' ? 'The browser does not allow the camera here.'
      : 'The camera cannot be used.');
  }
  if ($('camera').open) return stopCamera(stream);  // by an earlier click
  video.srcObject = stream;
  $('camera').returnValue = '';
  $('camera').showModal();
  await video.play();
}
const stopCamera = (stream) => { for (const track of stream.getTracks()) track.stop(); };
$('camera').onclose = () => {
  if ($('camera').returnValue === 'photo' && video.videoWidth) {
    const canvas = el('canvas', {width: video.videoWidth, height: video.videoHeight});
    canvas.getContext('2d').drawImage(video, 0, 0);
    canvas.toBlob((data) => attachImage(new File([data], 'photo.jpg', {type: data.type})), 'image/jpeg', 0.9);
  }
  stopCamera(video.srcObject);  // its light goes out
  video.srcObject = null;
};
async function imageTokens(one) {  // what the image adds to a message
  const number = async (content) => (await (await post('tokenize',
    {model: model?.id, messages: [{role: 'user', content}]})).json()).count;
  const text = {type: 'text', text: '.'};
  return await number([imagePart(one), text]) - await number([text]);
}
const imagePart = (one) => (urlOf(one) ? {type: 'image_url', image_url: {url: urlOf(one)}}
  : {type: 'text', text: `[The image ${one.name} is no longer here.]\n`});
function pictureNode(one) {  // of a message: a click shows it large, and small again
  const image = el('img', {src: one.small, alt: one.name});
  const node = el('button', {type: 'button', className: 'picture', title: one.name,
    ariaLabel: `Show ${one.name}`, ariaPressed: 'false', onclick: () => {
      const isLarge = node.ariaPressed !== 'true';
      node.ariaPressed = String(isLarge);
      image.src = isLarge ? urlOf(one) ?? one.small : one.small;
    }}, image);
  return node;
}
