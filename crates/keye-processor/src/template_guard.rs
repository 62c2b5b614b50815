//! What a chat template of a stranger may look like, and its instructions with a check before each that could take much.
//!
//! The template engine counts instructions, but one instruction can double a text, and its compiler calls itself for every
//! operator of a chain: either ends the process, not the rendering. So the source is measured before it is compiled, and
//! what is compiled passes its operands to the checks of [`crate::template_budget`].

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Token, WhitespaceConfig, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind, Value};

use crate::template_budget as budget;

/// Longest source; published ones have up to 20 KB.
const SOURCE_BYTES: usize = 256 << 10;
/// Most operators, brackets and the like of one tag, each of which may cost the compiler a call; published ones have up to 30.
const TAG_OPERATORS: usize = 256;
/// Most `elif` of a template; published ones have up to 20.
const BRANCHES: usize = 256;

const WHITESPACE: WhitespaceConfig =
    WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true };

fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::SyntaxError, reason.into())
}

/// Compiles `source`, all of it under guard.
pub(crate) fn compile<'s>(name: &'s str, source: &'s str) -> Result<Instructions<'s>, Error> {
    measure(source)?;
    let tree = parse(source, name, SyntaxConfig, WHITESPACE)?;
    let mut generator = CodeGenerator::new(name, source);
    generator.compile_stmt(&tree);
    guard(&generator.finish().0)
}

/// Names and words that are constants or operators, and make nothing a variable.
const CONSTANTS: [&str; 14] =
    ["true", "false", "none", "True", "False", "None", "and", "or", "not", "in", "is", "if", "else", "elif"];

/// What stands between brackets.
#[derive(Default)]
struct Group {
    /// It is called with or looked up in a value.
    of_value: bool,
    /// A variable is in it, so it is no constant.
    variable: bool,
    /// A text or a list is written out in it, or it is one.
    literal: bool,
    /// It stands behind an operator `*`.
    factor: bool,
}

/// Refuses what would take the compiler too much stack, or memory for constants.
fn measure(source: &str) -> Result<(), Error> {
    if source.len() > SOURCE_BYTES {
        return Err(refused(format!("expected at most {SOURCE_BYTES} bytes of source, found {}", source.len())));
    }
    let (mut operators, mut branches) = (0, 0);
    // Whether what stands before an operator `*` may be multiplied, and whether what follows has to be looked at. Products of
    // constants are made while compiling, whatever their size: texts and lists that are written out are not multiplied.
    let (mut factor, mut after_times) = (false, false);
    let mut groups: Vec<Group> = Vec::new();
    let mut follows_value = false;
    for token in tokenize(source, false, SyntaxConfig, WHITESPACE) {
        let (token, span) = token?;
        let line = span.start_line;
        let times = || refused(format!("line {line}: a text or a list that is written out cannot be multiplied"));
        if matches!(token, Token::Mul) && !factor {
            return Err(times());
        }
        match &token {
            Token::Int(_) | Token::Float(_) => (factor, after_times) = (true, false),
            Token::Ident(name) => {
                if let Some(group) = groups.last_mut() {
                    group.variable |= !CONSTANTS.contains(name);
                }
                (factor, after_times) = (true, false);
            }
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => {
                // Behind a value it is a call or a place in it, which is no constant.
                let of_value = follows_value;
                let literal = !of_value && !matches!(token, Token::ParenOpen);
                groups.push(Group { of_value, literal, factor: after_times, ..Group::default() });
                (factor, after_times) = (false, false);
            }
            Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                let group = groups.pop().unwrap_or_default();
                let may = group.of_value || group.variable || !group.literal;
                if group.factor && !may {
                    return Err(times());
                }
                if let Some(outer) = groups.last_mut() {
                    outer.variable |= group.variable || group.of_value;
                    outer.literal |= group.literal;
                }
                (factor, after_times) = (may, false);
            }
            Token::Str(_) | Token::String(_) => {
                if after_times {
                    return Err(times());
                }
                groups.iter_mut().for_each(|group| group.literal = true);
                factor = false;
            }
            Token::Mul => (factor, after_times) = (false, true),
            Token::Minus | Token::Plus => factor = false,
            _ => (factor, after_times) = (false, false),
        }
        follows_value = match &token {
            Token::Ident(name) => !CONSTANTS.contains(name),
            Token::Str(_) | Token::String(_) => true,
            Token::ParenClose | Token::BracketClose | Token::BraceClose => true,
            _ => false,
        };
        match token {
            Token::VariableStart | Token::BlockStart => operators = 0,
            Token::Ident("elif") => branches += 1,
            Token::Ident("and" | "or" | "not" | "if" | "else" | "in" | "is") => operators += 1,
            Token::Ident(_) | Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Int128(_) | Token::Float(_) => {
            }
            Token::Comma | Token::Colon | Token::Assign => {}
            Token::BracketClose | Token::ParenClose | Token::BraceClose => {}
            Token::TemplateData(_) | Token::VariableEnd | Token::BlockEnd => {}
            _ => operators += 1,
        }
        if operators > TAG_OPERATORS {
            return Err(refused(format!(
                "line {line}: expected at most {TAG_OPERATORS} operators in a tag, found more"
            )));
        }
        if branches > BRANCHES {
            return Err(refused(format!("line {line}: expected at most {BRANCHES} elif, found more")));
        }
    }
    Ok(())
}

/// The same program, with checks.
fn guard<'s>(from: &Instructions<'s>) -> Result<Instructions<'s>, Error> {
    let mut to = Instructions::new(from.name(), from.source());
    let mut moved = Vec::with_capacity(from.len() + 1);
    let mut at = 0;
    while let Some(instruction) = from.get(at) {
        moved.push(to.len() as u32);
        let line = from.get_line(at).and_then(|line| u16::try_from(line).ok()).unwrap_or_default();
        for step in steps(instruction, line)? {
            to.add_with_line(step, line);
        }
        at += 1;
    }
    moved.push(to.len() as u32);
    for at in 0..to.len() as u32 {
        use Instruction::{BuildMacro, Iterate, Jump, JumpIfFalse, JumpIfFalseOrPop, JumpIfTrueOrPop};
        if let Some(
            Iterate(target)
            | Jump(target)
            | JumpIfFalse(target)
            | JumpIfFalseOrPop(target)
            | JumpIfTrueOrPop(target)
            | BuildMacro(_, target, _),
        ) = to.get_mut(at)
        {
            *target = *moved.get(*target as usize).ok_or_else(|| refused("a jump leads nowhere"))?;
        }
    }
    Ok(to)
}

/// An instruction and what stands around it.
fn steps<'s>(instruction: &Instruction<'s>, line: u16) -> Result<Vec<Instruction<'s>>, Error> {
    use Instruction as I;
    // The check takes the operands and gives them back.
    let checked = |check: &'static str, operands: usize| {
        vec![I::CallFunction(check, Some(operands as u16)), I::UnpackList(operands), instruction.clone()]
    };
    let kept = |check: &'static str| vec![instruction.clone(), I::CallFunction(check, Some(1))];
    Ok(match instruction {
        // Raw text would reach what a macro or a block collects uncounted.
        I::EmitRaw(text) => vec![I::LoadConst(Value::from(*text)), I::Emit],
        I::Add => checked(budget::ADD, 2),
        I::Mul => checked(budget::MULTIPLY, 2),
        I::StringConcat => checked(budget::CONCAT, 2),
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte => checked(budget::COMPARE, 2),
        I::In => checked(budget::CONTAINS, 2),
        // Whichever comparison it is: the dearer of the two.
        I::CompareAndPreserve(_) => {
            let mut steps = vec![I::CallFunction(budget::CONTAINS, Some(2)), I::UnpackList(2)];
            steps.extend(checked(budget::COMPARE, 2));
            steps
        }
        I::GetItem => checked(budget::ITEM, 2),
        I::SetAttr(_) => checked(budget::SET, 2),
        I::Slice => {
            let mut steps = checked(budget::SLICE, 4);
            steps.push(I::CallFunction(budget::ROW, Some(1)));
            steps
        }
        // Without a number it is what a loop with a condition has gathered.
        I::BuildList(_) | I::BuildMap(_) => kept(budget::KEPT),
        I::UnpackLists(_) | I::MergeKwargs(_) => {
            return Err(refused(format!("line {line}: arguments out of a list or a map (* and **) are not supported")));
        }
        I::Include(_) | I::LoadBlocks | I::CallBlock(_) | I::ExportLocals | I::FastSuper => {
            return Err(refused(format!("line {line}: block, extends, include and import are not supported")));
        }
        other => vec![other.clone()],
    })
}
