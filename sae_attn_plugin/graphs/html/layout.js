/* Where nodes lie: tokens as columns, sublayers as rows, each cell filled line by line. */
(function (sag) {
  "use strict";

  const SLOT = 26;
  const LINE = 27;
  const ROW_GAP = 26;
  const COLUMN_GAP = 12;
  const MIN_COLUMN = 40;

  /**
   * Coordinates of the nodes in `mask` for a plot of `width` x `height`, in pixels at scale 1.
   * As many nodes a line as give the plot's proportions; spare room goes to columns and rows.
   */
  sag.layout = function (model, mask, width, height) {
    const cells = new Map();
    for (const i of model.nodeOrder) {
      if (!mask[i]) continue;
      const node = model.nodes[i];
      const key = model.rowKey(node) + "@" + node.position;
      if (!cells.has(key)) cells.set(key, { row: model.rowKey(node), at: node.position, list: [] });
      cells.get(key).list.push(i);
    }
    const used = new Set([...cells.values()].map((cell) => cell.row));
    const rows = model.rows.filter((row) => used.has(row.key));
    const last = model.nodes.reduce((most, node) => Math.max(most, node.position), 0);
    const n = Math.max(model.tokens.length, last + 1);
    let best = null;
    for (let perLine = 1; perLine <= 24; perLine++) {
      const plan = plans(cells, rows, n, perLine, model);
      const scale = Math.min(width / plan.width, height / plan.height, 1);
      // the largest picture that fits; of those, the one with the fewest lines
      if (!best || scale > best.scale * 1.001) best = { ...plan, scale };
    }
    const spareX = Math.max(0, width / best.scale - best.width);
    const spareY = Math.max(0, height / best.scale - best.height);
    const filled = best.columns.map((column) => column.filled);
    const weightX = filled.reduce((sum, is) => sum + (is ? 3 : 1), 0);
    let x = 0;
    const columns = best.columns.map((column, position) => {
      const size = column.size + Math.min((spareX * (filled[position] ? 3 : 1)) / weightX, 90 / best.scale);
      const place = { position, x, size, middle: x + size / 2, filled: filled[position] };
      x += size;
      return place;
    });
    let y = 0;
    const stretch = rows.length ? Math.min(spareY / rows.length, 70 / best.scale) : 0;
    const placed = [...rows].reverse().map((row) => {
      const size = best.heights.get(row.key) + stretch;
      const place = { ...row, y, size, middle: y + size / 2 };
      y += size;
      return place;
    });
    const rowAt = new Map(placed.map((row) => [row.key, row]));
    const xs = new Float32Array(model.nodes.length);
    const ys = new Float32Array(model.nodes.length);
    for (const cell of cells.values()) {
      const order = [...cell.list].sort(
        (a, b) =>
          sag.kindOrder(model.nodes[a].kind) - sag.kindOrder(model.nodes[b].kind) ||
          model.nodes[b].influence - model.nodes[a].influence
      );
      const lines = Math.ceil(order.length / best.perLine);
      const each = Math.ceil(order.length / lines);
      const column = columns[cell.at];
      const row = rowAt.get(cell.row);
      const slot = Math.min((column.size - COLUMN_GAP) / each, 46);
      const step = Math.min((row.size - ROW_GAP * 0.6) / lines, 36);
      order.forEach((i, k) => {
        const line = Math.floor(k / each);
        const inLine = Math.min(each, order.length - line * each);
        xs[i] = column.middle + ((k % each) - (inLine - 1) / 2) * slot;
        ys[i] = row.middle - (line - (lines - 1) / 2) * step - 3;
      });
    }
    return { x: xs, y: ys, columns, rows: placed, width: x, height: y };
  };

  function plans(cells, rows, n, perLine, model) {
    const columns = Array.from({ length: n }, (_, at) => ({
      size: n > 60 ? 14 : Math.min([...sag.word(model.token(at))].length, 8) * 6 + 12,
      filled: false,
    }));
    const lines = new Map(rows.map((row) => [row.key, 1]));
    for (const cell of cells.values()) {
      const count = Math.ceil(cell.list.length / perLine);
      const each = Math.ceil(cell.list.length / count);
      const column = columns[cell.at];
      column.filled = true;
      const token = Math.min([...sag.word(model.token(cell.at))].length, 12) * 7 + 10;
      column.size = Math.max(column.size, each * SLOT + COLUMN_GAP, Math.max(MIN_COLUMN, token));
      lines.set(cell.row, Math.max(lines.get(cell.row), count));
    }
    const heights = new Map(rows.map((row) => [row.key, lines.get(row.key) * LINE + ROW_GAP]));
    return {
      perLine,
      columns,
      heights,
      width: columns.reduce((sum, column) => sum + column.size, 0),
      height: [...heights.values()].reduce((sum, size) => sum + size, 0),
    };
  }
})((window.SaeAttnGraph = window.SaeAttnGraph || {}));
