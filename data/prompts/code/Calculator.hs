-- A calculator for expressions such as "2 * (3 + x) - y", written as a parser made of small parsers.
module Main where

import Data.Char (isAlpha, isDigit, isSpace)
import qualified Data.Map as Map

data Expr
  = Number Double
  | Variable String
  | Binary Char Expr Expr
  deriving (Show, Eq)

newtype Parser a = Parser { runParser :: String -> Either String (a, String) }

instance Functor Parser where
  fmap f (Parser p) = Parser $ \s -> case p s of
    Left err -> Left err
    Right (a, rest) -> Right (f a, rest)

instance Applicative Parser where
  pure a = Parser $ \s -> Right (a, s)
  Parser pf <*> Parser pa = Parser $ \s -> do
    (f, rest) <- pf s
    (a, rest') <- pa rest
    pure (f a, rest')

instance Monad Parser where
  Parser p >>= f = Parser $ \s -> do
    (a, rest) <- p s
    runParser (f a) rest

peek :: Parser (Maybe Char)
peek = Parser $ \s -> case dropWhile isSpace s of
  [] -> Right (Nothing, [])
  rest@(c : _) -> Right (Just c, rest)

advance :: Parser ()
advance = Parser $ \s -> Right ((), drop 1 s)

takeAll :: (Char -> Bool) -> Parser String
takeAll wanted = Parser $ \s -> Right (span wanted s)

failWith :: String -> Parser a
failWith message = Parser $ \s -> Left (message ++ " before " ++ show (take 10 s))

-- Operators of one level, applied from left to right.
level :: [Char] -> Parser Expr -> Parser Expr
level operators operand = operand >>= loop
  where
    loop left = peek >>= \next -> case next of
      Just c | c `elem` operators -> advance >> operand >>= loop . Binary c left
      _ -> pure left

expression, term, factor :: Parser Expr
expression = level "+-" term
term = level "*/" factor
factor = peek >>= \next -> case next of
  Just '(' -> advance *> expression <* close
  Just c
    | isDigit c -> Number . read <$> takeAll isDigit
    | isAlpha c -> Variable <$> takeAll isAlpha
  _ -> failWith "expected a number, a name or a bracket"
  where
    close = peek >>= \next -> if next == Just ')' then advance else failWith "expected )"

evaluate :: Map.Map String Double -> Expr -> Either String Double
evaluate _ (Number x) = Right x
evaluate env (Variable name) = maybe (Left ("unknown name " ++ name)) Right (Map.lookup name env)
evaluate env (Binary op left right) = do
  a <- evaluate env left
  b <- evaluate env right
  case op of
    '+' -> Right (a + b)
    '-' -> Right (a - b)
    '*' -> Right (a * b)
    _ | b == 0 -> Left "division by zero"
      | otherwise -> Right (a / b)

main :: IO ()
main = mapM_ report ["2 * (3 + x) - y", "10 / (x - 4)", "7 + ", "a * 2"]
  where
    env = Map.fromList [("x", 4), ("y", 1.5)]
    report text = putStrLn (text ++ " = " ++ either ("error: " ++) show (runParser expression text >>= evaluate env . fst))
