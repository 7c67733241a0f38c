# Carves a maze into a grid, finds the way through it and draws both.

class Maze
  STEPS = { north: [0, -1], south: [0, 1], east: [1, 0], west: [-1, 0] }.freeze

  def initialize(width, height, seed: 1)
    raise ArgumentError, "a maze needs at least one cell" if width < 1 || height < 1

    @width = width
    @height = height
    @random = Random.new(seed)
    @doors = Hash.new { |hash, cell| hash[cell] = [] }
    carve([0, 0])
  end

  def solve(from: [0, 0], to: [@width - 1, @height - 1])
    came_from = { from => nil }
    queue = [from]
    until queue.empty?
      cell = queue.shift
      break if cell == to

      @doors[cell].each do |neighbour|
        next if came_from.key?(neighbour)

        came_from[neighbour] = cell
        queue << neighbour
      end
    end
    path = [to]
    path.unshift(came_from[path.first]) while came_from[path.first]
    path
  end

  def to_s(path = [])
    lines = ["+" + "---+" * @width]
    @height.times do |y|
      row = "|"
      floor = "+"
      @width.times do |x|
        row << (path.include?([x, y]) ? " o " : "   ")
        row << (@doors[[x, y]].include?([x + 1, y]) ? " " : "|")
        floor << (@doors[[x, y]].include?([x, y + 1]) ? "   +" : "---+")
      end
      lines << row << floor
    end
    lines.join("\n")
  end

  private

  def carve(start)
    visited = { start => true }
    stack = [start]
    until stack.empty?
      cell = stack.last
      options = neighbours(cell).reject { |other| visited[other] }
      if options.empty?
        stack.pop
      else
        chosen = options.sample(random: @random)
        @doors[cell] << chosen
        @doors[chosen] << cell
        visited[chosen] = true
        stack.push(chosen)
      end
    end
  end

  def neighbours((x, y))
    STEPS.values.map { |dx, dy| [x + dx, y + dy] }
         .select { |cx, cy| cx.between?(0, @width - 1) && cy.between?(0, @height - 1) }
  end
end

maze = Maze.new(12, 6, seed: 7)
path = maze.solve
puts maze.to_s(path)
puts "#{path.length} steps"
