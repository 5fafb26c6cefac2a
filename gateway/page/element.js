// Makes a DOM element with properties set. Text goes in as text, never as markup.
export function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}
