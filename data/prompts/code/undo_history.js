// A list of tasks that can take back and repeat what was done to it.

class History {
  #past = [];
  #future = [];

  run(command) {
    command.apply();
    this.#past.push(command);
    this.#future.length = 0;
  }

  undo() {
    const command = this.#past.pop();
    if (!command) return false;
    command.revert();
    this.#future.push(command);
    return true;
  }

  redo() {
    const command = this.#future.pop();
    if (!command) return false;
    command.apply();
    this.#past.push(command);
    return true;
  }
}

class TaskList {
  constructor() {
    this.tasks = new Map();
    this.history = new History();
    this.nextId = 1;
  }

  add(title) {
    const id = this.nextId++;
    this.history.run({
      apply: () => this.tasks.set(id, { title, done: false }),
      revert: () => this.tasks.delete(id),
    });
    return id;
  }

  finish(id) {
    const task = this.tasks.get(id);
    if (!task) throw new RangeError(`no task with number ${id}`);
    const before = task.done;
    this.history.run({
      apply: () => { this.tasks.get(id).done = true; },
      revert: () => { this.tasks.get(id).done = before; },
    });
  }

  toString() {
    return [...this.tasks]
      .map(([id, { title, done }]) => `${done ? "x" : " "} ${id}. ${title}`)
      .join("\n");
  }
}

const list = new TaskList();
const water = list.add("water the tomatoes");
list.add("return the ladder");
list.finish(water);
console.log(list.toString());

list.history.undo();
list.history.undo();
console.log("--- after two steps back");
console.log(list.toString());

while (list.history.redo());
console.log("--- and forward again");
console.log(list.toString());
