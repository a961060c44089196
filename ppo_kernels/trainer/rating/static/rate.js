"use strict";

const element = (id) => document.getElementById(id);
let state = null;
let busy = true; // until an answer has arrived, so that a second key press does not rate the next text unseen

async function call(action, body) {
  busy = true;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(action, body === undefined ? {} : options);
    const answer = await response.json();
    if (response.ok) {
      state = answer;
      report("");
    } else {
      report(answer.error);
      if (response.status === 409) state = await (await fetch("state")).json();
    }
    show();
  } catch {
    report("no answer from ppo-kernels rate: is it still running?");
  }
  busy = false;
}

function report(text) {
  element("error").textContent = text;
  element("error").hidden = text === "";
}

function add(parent, tag, text, name) {
  const child = parent.appendChild(document.createElement(tag));
  child.textContent = text;
  if (name) child.className = name;
  return child;
}

function show() {
  const open = state.key !== null;
  element("progress").max = state.total;
  element("progress").value = state.done;
  element("count").textContent = `${state.done} of ${state.total}`;
  element("undo").disabled = !state.can_undo;
  element("skip").disabled = !open;
  element("end").hidden = open;
  element("end").textContent = `All is answered, and in ${state.file}.`;
  element("question").textContent = !open ? "Thank you" : state.options === 2 ? "Which is better?" : "How good is this?";
  const cards = element("cards");
  cards.replaceChildren();
  for (const completion of state.completions) {
    const card = add(cards, "article", "");
    if (typeof state.prompt === "string") {
      add(card, "span", state.prompt, "prompt");
      add(card, "span", completion, "completion");
    } else {
      for (const message of [...state.prompt, { role: "assistant", content: completion }]) {
        add(card, "h2", message.role);
        add(card, "p", message.content, "message");
      }
      card.lastElementChild.classList.add("completion");
    }
  }
  const answers = element("answers");
  answers.replaceChildren();
  for (let option = 1; open && option <= state.options; option++) {
    const label = state.options === 2 ? ["First", "Second"][option - 1] : "★".repeat(option);
    const button = add(answers, "button", `${label} `);
    button.type = "button";
    button.dataset.option = option;
    button.setAttribute("aria-label", state.options === 2 ? `${label} is better` : `${option} of 5 stars`);
    add(button, "kbd", state.options === 2 ? "←→"[option - 1] : option);
    button.addEventListener("click", () => act("answer", option));
  }
}

function act(action, option) {
  if (busy || state === null) return;
  if (action === "undo" ? !state.can_undo : state.key === null) return;
  call(action, { key: state.key, option });
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || state === null) return;
  const arrows = state.options === 2 ? { ArrowLeft: 1, ArrowRight: 2 } : {};
  const option = arrows[event.key] ?? (/^[1-9]$/.test(event.key) ? Number(event.key) : 0);
  if (option >= 1 && option <= state.options) act("answer", option);
  else if (event.key === "s") act("skip");
  else if (event.key === "u") act("undo");
  else return;
  event.preventDefault();
});

element("undo").addEventListener("click", () => act("undo"));
element("skip").addEventListener("click", () => act("skip"));
element("finish").addEventListener("click", async () => {
  await call("finish", {});
  busy = true;
  document.querySelector("footer").remove();
  element("cards").replaceChildren();
  element("answers").replaceChildren();
  element("question").textContent = "Thank you";
  element("end").hidden = false;
  element("end").textContent = `The answers are in ${state.file}. You may close this page.`;
});
call("state");
