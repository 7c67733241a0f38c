// Reads comma-separated text with quoted fields and answers simple questions about its columns.

type Row = Readonly<Record<string, string>>;

export class CsvError extends Error {
  constructor(message: string, readonly line: number) {
    super(`line ${line}: ${message}`);
  }
}

export function* parseRecords(text: string): Generator<string[]> {
  let record: string[] = [];
  let field = "";
  let quoted = false;
  let line = 1;
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (c === "\n") line++;
    if (quoted) {
      if (c !== '"') field += c;
      else if (text[i + 1] === '"') field += text[++i];
      else quoted = false;
    } else if (c === '"') {
      if (field !== "") throw new CsvError("a quote inside an unquoted field", line);
      quoted = true;
    } else if (c === ",") {
      record.push(field);
      field = "";
    } else if (c === "\n") {
      yield [...record, field];
      record = [];
      field = "";
    } else if (c !== "\r") {
      field += c;
    }
  }
  if (quoted) throw new CsvError("the text ends inside a quoted field", line);
  if (field !== "" || record.length > 0) yield [...record, field];
}

export class Table {
  private constructor(readonly columns: string[], readonly rows: Row[]) {}

  static parse(text: string): Table {
    const [header, ...records] = [...parseRecords(text)];
    if (!header) throw new CsvError("there is no header", 1);
    const rows = records.map((record, index) => {
      if (record.length !== header.length) {
        throw new CsvError(`expected ${header.length} fields, found ${record.length}`, index + 2);
      }
      return Object.fromEntries(header.map((name, i) => [name, record[i]]));
    });
    return new Table(header, rows);
  }

  groupSum(by: string, value: string): Map<string, number> {
    const totals = new Map<string, number>();
    for (const row of this.rows) {
      const amount = Number(row[value]);
      if (Number.isNaN(amount)) continue;
      totals.set(row[by], (totals.get(row[by]) ?? 0) + amount);
    }
    return totals;
  }
}

const sales = Table.parse('town,goods,crates\nOban,"herring, smoked",12\nTain,apples,7\nOban,apples,5\n');
for (const [town, crates] of sales.groupSum("town", "crates")) {
  console.log(`${town}: ${crates}`);
}
