// One message of the conversation on the page, with its figures and path where it is an answer.

import { ApiError, requestStatus } from "./api.js";
import { element } from "./element.js";
import { drawPath, isOver } from "./path.js";

const LOOK_MS = 300;
const MAX_LAST_LOOKS = 10;

let pathIsRefused = false;

export function showQuestion(list, text) {
  const item = element("li", { className: "user" });
  item.append(element("div", { className: "body", textContent: text }));
  list.append(item);
  item.scrollIntoView({ block: "end" });
}

export class Answer {
  constructor(list) {
    this.list = list;
    this.text = "";
    this.reasoning = "";
    this.tokens = 0;
    this.began = performance.now();
    this.firstAt = this.lastAt = null;
    this.item = element("li", { className: "assistant live" });
    this.item.setAttribute("aria-busy", "true");
    this.thoughts = element("details", { className: "reasoning", hidden: true });
    this.thoughts.append(element("summary", { textContent: "Reasoning" }), element("div"));
    this.body = element("div", { className: "body" });
    this.figures = element("div", { className: "figures" });
    this.path = element("ol", { className: "path" });
    this.path.setAttribute("aria-label", "Workers that carried this answer");
    this.item.append(this.thoughts, this.body, this.figures, this.path);
    list.append(this.item);
    this.follow();
  }

  take(chunk) {
    if (!this.id) {
      this.id = chunk.id;
      this.watched = this.watchPath();
    }
    const choice = chunk.choices[0];
    const delta = choice?.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    if (delta.content || thought) {
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
      this.tokens += 1; // a chunk per token, as a rule; the usage at the end corrects it
    }
    this.text += delta.content ?? "";
    this.reasoning += thought;
    this.finish = choice?.finish_reason ?? this.finish;
    if (chunk.usage) {
      this.usage = chunk.usage;
      this.tokens = chunk.usage.completion_tokens;
    }
    this.draw();
  }

  draw() {
    this.frame ??= requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    this.thoughts.hidden = !this.reasoning;
    this.thoughts.lastChild.textContent = this.reasoning;
    this.body.replaceChildren(...rendered(this.text));
    this.figures.replaceChildren(...this.drawnFigures());
    this.follow();
  }

  drawnFigures() {
    const figures = [];
    if (this.firstAt !== null) figures.push([`${Math.round(this.firstAt - this.began)} ms`, "to first token"]);
    const span_s = (this.lastAt - this.firstAt) / 1000;
    if (this.tokens > 1 && span_s > 0) figures.push([((this.tokens - 1) / span_s).toFixed(1), "tokens/s"]);
    if (this.tokens) figures.push([this.tokens, this.tokens === 1 ? "token" : "tokens"]);
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      figures.push([`${cached} of ${this.usage.prompt_tokens}`, "prompt tokens cached"]);
    }
    if (this.finish === "length") figures.push(["cut", "at max tokens"]);
    if (this.stopped) figures.push(["stopped", "by you"]);
    return figures.map(([value, unit]) => {
      const figure = element("span");
      figure.append(element("b", { textContent: value }), ` ${unit}`);
      return figure;
    });
  }

  end() {
    this.over = true;
    this.drawNow();
    this.item.classList.remove("live");
    this.item.removeAttribute("aria-busy");
  }

  stop() {
    this.stopped = true;
  }

  fail(error) {
    this.item.append(element("p", { className: "failed", role: "alert", textContent: explain(error) }));
  }

  // Looks where the request is until it is over. What Redis says lags a little, so the last word is waited for.
  async watchPath() {
    for (let last = 0; !pathIsRefused && last < MAX_LAST_LOOKS; last += this.over ? 1 : 0) {
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
      try {
        const status = await requestStatus(this.id);
        drawPath(this.path, status);
        this.follow();
        if (isOver(status)) return;
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 403) {
          pathIsRefused = true;
          this.path.replaceChildren(element("li", { textContent: "The path over the workers needs an admin key." }));
        }
      }
    }
  }

  // Keeps the end in view unless the reader has scrolled up.
  follow() {
    const list = this.list;
    if (list.scrollHeight - list.scrollTop - list.clientHeight < 160) list.scrollTop = list.scrollHeight;
  }
}

export function forgetRefusal() {
  pathIsRefused = false;
}

export function explain(error) {
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  return `${error.message}${wait}`;
}

// Text with fenced code set apart.
function rendered(text) {
  return text.split(/^```[^\n]*\n?/m).map((part, at) => (at % 2 ? element("pre", { textContent: part }) : part));
}
