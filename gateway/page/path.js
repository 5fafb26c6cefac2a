// A request's path over the workers, as GET /v1/requests/{id} tells it.

import { element } from "./element.js";

const EXPECTED = new Set(["admitted", "prefilled", "handed_off"]);
const ENDED = new Set(["finished", "failed"]);

export function isOver(status) {
  return ENDED.has(status.state);
}

// Draws one chip per stay. A stay whose epoch was overtaken is struck out: its worker was lost or gave the request back.
export function drawPath(list, status) {
  const last = status.hops.length - 1;
  list.replaceChildren(
    ...status.hops.map((hop, at) => {
      const next = status.hops[at + 1];
      const item = element("li", {
        className: next && next.epoch > hop.epoch ? "gone" : at === last && !isOver(status) ? "now" : "",
      });
      if (at > 0) item.append(element("span", { className: "step", textContent: arrow(hop) }));
      if (!EXPECTED.has(hop.reason)) item.append(element("span", { className: "why", textContent: why(hop, status.hops[at - 1]) }));
      const chip = element("span", { className: "hop", title: new Date(hop.at_s * 1000).toLocaleTimeString() });
      chip.append(hop.worker, element("small", { textContent: hop.role }));
      item.append(chip);
      return item;
    }),
  );
}

function arrow(hop) {
  return hop.transport ? `— ${hop.transport} →` : "→";
}

function why(hop, before) {
  const reason = hop.reason.replaceAll("_", " ");
  return before && hop.epoch > before.epoch ? `${reason}: replayed` : `moved: ${reason}`;
}
