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

/// Refuses what would take the compiler too much stack, or memory for constants.
fn measure(source: &str) -> Result<(), Error> {
    if source.len() > SOURCE_BYTES {
        return Err(refused(format!("expected at most {SOURCE_BYTES} bytes of source, found {}", source.len())));
    }
    let (mut operators, mut branches) = (0, 0);
    // What stands before an operator `*`: whether it may be multiplied, and whether what follows has to be looked at.
    let (mut factor, mut after_times) = (false, false);
    for token in tokenize(source, false, SyntaxConfig, WHITESPACE) {
        let (token, span) = token?;
        let line = span.start_line;
        // Products of constants are made while compiling, whatever their size: texts and lists are not multiplied.
        let number = matches!(token, Token::Ident(_) | Token::Int(_) | Token::Float(_));
        if matches!(token, Token::Mul) && !factor || after_times && !number {
            return Err(refused(format!("line {line}: expected a name or a number on both sides of *, found another")));
        }
        (factor, after_times) = (number, matches!(token, Token::Mul));
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
        I::BuildList(Some(_)) | I::BuildMap(_) => kept(budget::KEPT),
        I::BuildList(None) | I::UnpackLists(_) | I::MergeKwargs(_) => {
            return Err(refused(format!("line {line}: arguments out of a list or a map (* and **) are not supported")));
        }
        I::Include(_) | I::LoadBlocks | I::CallBlock(_) | I::ExportLocals | I::FastSuper => {
            return Err(refused(format!("line {line}: block, extends, include and import are not supported")));
        }
        other => vec![other.clone()],
    })
}
